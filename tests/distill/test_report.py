"""The report of a run: its numbers, its samples, and the page in a headless Chromium."""

from __future__ import annotations

import html.parser
import json
from collections import Counter

import numpy as np
import pytest
from tiny_models import EOS, SMALL_SPECIAL_TOKENS, build_small_tokenizer, small_ids
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from sglang_optimal.distill.records import Record
from sglang_optimal.distill.report import write_report
from sglang_optimal.distill.report.histogram import ALPHA_EDGES, KL_EDGES, LOGPROB_EDGES
from sglang_optimal.distill.report.samples import Selection, problem_name, token_limit
from sglang_optimal.distill.report.statistics import collect
from sglang_optimal.distill.report.verdicts import headline, judge, more_often, self_check, wilson
from sglang_optimal.distill.store import RecordStore
from sglang_optimal.names import SERIES
from sglang_optimal.token_view import token_pieces

EOS_ID = SMALL_SPECIAL_TOKENS.index(EOS)
HOSTILE = (
    "</script><img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script> {{ 7*7 }} `$x$`"
)
REASONS = [("finish", "ended by length"), ("answer", "wrong answer"), ("answer", "no answer found")]
TEXT = "the train travels 60 * 3 = 180.\nso the answer is 180."


def record(i: int, rng, *, text: str = TEXT, reject=None, strategy: str = "copy", **values) -> Record:
    """A record whose tokens are characters and an end-of-text token."""
    ids = [*small_ids(text.lower()), EOS_ID] if all(c.lower() in TEXT for c in text) else [5] * 8
    size = len(ids)
    alpha = rng.beta(2, 3, size)
    alpha[rng.random(size) < 0.1] = 0.0
    alpha[rng.random(size) < 0.05] = 1.0
    series = {
        "alpha": alpha,
        "teacher_logprob": -rng.exponential(0.5, size),
        "student_logprob": -rng.exponential(1.5, size),
        "mixture_logprob": -rng.exponential(0.7, size),
        "kl_to_student": rng.lognormal(-2, 1, size),
        "kl_to_teacher": rng.lognormal(-2, 1, size),
        "ess_ratio": rng.lognormal(0, 1, size),
    }
    values = {
        "fields": {"problem": f"problem {i}?", "answer": str(i), "level": "easy"},
        "teacher_context": [{"role": "user", "content": f"problem {i}? the answer is {i}."}],
        "student_context": f"problem {i}?",
        "finish_reason": "length" if reject == REASONS[0] else "stop",
        "latency": 0.5 + i / 10,
        "models": {"teacher_model": "missing/teacher", "student_model": "missing/student"},
        **{name: [float(np.float32(v)) for v in series[name]] for name in SERIES},
        **values,
    }
    return Record(
        id=f"p{i}/{strategy}/0", problem_id=f"p{i}", strategy=strategy, sample_index=0, text=text, token_ids=ids,
        seed=i, accepted=reject is None, rejected_by=reject and reject[0], reject_reason=reject and reject[1], **values,
    )  # fmt: skip


def mixed_records(count: int = 60) -> list[Record]:
    """Two of three accepted, of two strategies, and of different lengths."""
    rng = np.random.default_rng(1)
    return [
        record(
            i, rng, text=TEXT[: 10 + i % 40], reject=REASONS[i // 3 % 3] if i % 3 == 0 else None,
            strategy=("copy", "hint")[i % 2],
        )
        for i in range(count)
    ]  # fmt: skip


def build(folder, records, manifest=None, *, finalize: bool = True, **options):
    store = RecordStore(folder, **{"shard_records": 25, **options})
    for one in records:
        store.append(one)
    if finalize:
        store.finalize()
    store.write_json(store.manifest_path, {} if manifest is None else manifest)
    store.close()
    return folder


MANIFEST = {
    "state": "complete", "started": "2025-01-01T00:00:00+00:00", "elapsed_seconds": 10.0, "planned": 60, "failed": 0,
    "filters": ["length", "finish", "answer"],
    "config": {"mixing": {"alpha_method": "kl_symmetry"}, "sampling": {"max_new_tokens": 400}},
}  # fmt: skip


class _Tags(html.parser.HTMLParser):
    """The elements of a page, the attributes of all of them, and the text of its JSON."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str | None]] = []
        self.data, self._in_data = "", False
        self.visible: list[str] = []
        self._by_id: dict[str, list] = {}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += attrs
        if name := dict(attrs).get("id"):
            self._by_id[name] = attrs
        self._in_data = dict(attrs).get("id") == "data"

    def handle_endtag(self, tag):
        self._in_data = False

    def handle_data(self, data):
        if self._in_data:
            self.data += data
        elif self.lasttag not in ("script", "style"):
            self.visible.append(data)

    def of(self, name: str) -> list[tuple[str, str | None]]:
        """Attributes of the element of this id."""
        return self._by_id[name]

    @property
    def samples(self) -> list[dict]:
        return json.loads(self.data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.visible).split())


def page_of(folder, **options) -> _Tags:
    path = write_report(folder, **options)
    assert path == folder / "report.html"
    text = path.read_text(encoding="utf-8")
    assert "://" not in text.replace("http://www.w3.org/", "").split('id="data"')[0]
    return _Tags(text)


# -- numbers -------------------------------------------------------------------------------------------------------


def flat(records, name: str) -> np.ndarray:
    return np.concatenate([np.array(getattr(one, name), dtype=np.float64) for one in records])


@pytest.mark.parametrize("options", [{}, {"format": "jsonl"}, {"finalize": False}])
def test_sums_and_histograms(tmp_path, options):
    records = mixed_records()
    statistics = collect(build(tmp_path, records, MANIFEST, **options), 10)
    alpha = flat(records, "alpha")
    inner = (alpha > 1e-4) & (alpha < 1 - 1e-4)
    assert statistics.known == len(alpha) and statistics.inner_tokens == inner.sum()
    assert statistics.at_min == (alpha == 0).sum() > 0 and statistics.at_max == (alpha == 1).sum() > 0
    for name, mean in statistics.means.items():
        assert mean.value == pytest.approx(flat(records, name).mean())
    for name in ("kl_to_student", "kl_to_teacher"):
        values = flat(records, name)
        assert statistics.inner[name].value == pytest.approx(values[inner].mean())
        assert (statistics.histograms[name].counts == np.histogram(values, KL_EDGES)[0]).all()
    log_ess = np.log(flat(records, "ess_ratio")[inner]).mean()
    assert statistics.inner["log_ess"].value == pytest.approx(log_ess, abs=1e-6)
    assert (statistics.alpha_histogram.counts == np.histogram(alpha, ALPHA_EDGES)[0]).all()
    assert statistics.by_length == sum(one.finish_reason == "length" for one in records)
    assert statistics.latency.quantile(0.5) == pytest.approx(np.median([one.latency for one in records]), rel=0.1)
    assert statistics.tally.strategies["copy"] == [20, 30]
    for group, accepted in ((statistics.accepted, True), (statistics.rejected, False)):
        members = [one for one in records if one.accepted is accepted]
        logprob = flat(members, "student_logprob")
        assert group.logprob.value == pytest.approx(logprob.mean())
        assert group.rare == (np.exp(logprob) < 1e-3).sum() > 0
        assert (group.alpha.counts == np.histogram(flat(members, "alpha"), ALPHA_EDGES)[0]).all()
        assert (group.student_logprob.counts == np.histogram(logprob, LOGPROB_EDGES)[0]).all()
        assert group.lengths == Counter(len(one.token_ids) for one in members)


def test_series_by_position(tmp_path):
    records = mixed_records(300)
    statistics = collect(build(tmp_path, records, MANIFEST), 0)
    series = statistics.by_position["alpha"]
    for position in (0, 1, 9):  # bins of one token
        values = np.array([one.alpha[position] for one in records])
        assert series.count[position] == 300
        assert series.sum[position] == pytest.approx(values.sum())
        mean = statistics.by_position["kl_to_teacher"]
        assert mean.sum[position] == pytest.approx(sum(one.kl_to_teacher[position] for one in records))
        assert (series.values[position] == np.histogram(values, ALPHA_EDGES)[0]).all()
    starts = np.arange(11)  # the last run of bins goes to the end
    found = series.quantiles(starts, [0.3, 0.5, 0.8], 0.0, 1.0)
    for position in starts[:10]:
        values = [one.alpha[position] for one in records]
        for q, value in zip((0.3, 0.5, 0.8), found[:, position], strict=True):
            # As near as a bin of 0.01 and the gap to the next sample allow.
            low, high = np.quantile(values, [q - 1 / 300, q + 1 / 300])
            assert low - 0.011 < value < high + 0.011
    assert series.count.sum() == sum(len(one.token_ids) for one in records)
    merged = series.bins()
    assert merged[0] == 0 and np.add.reduceat(series.count, merged).sum() == series.count.sum()
    assert np.nanmean(series.mean(merged)) == pytest.approx(statistics.means["alpha"].value, abs=0.05)


def test_a_token_without_probability(tmp_path):
    """A stored null was −inf: no part of a mean, but far from the student."""
    rng = np.random.default_rng(0)
    one = record(0, rng)
    one.student_logprob = [-1.0] * (len(one.token_ids) - 2) + [-np.inf, float("nan")]
    found = marks(build(tmp_path, [one], MANIFEST))["Coverage by the student"][1]
    assert "log-probability −1.000 nats" in found
    assert f"{100 * 2 / len(one.token_ids):.1f} % of them a probability below 0.001" in found
    assert page_of(tmp_path).samples[0]["series"]["student_logprob"][-1] is None


def test_machines_add_up(tmp_path):
    records = mixed_records()
    for i in range(2):
        manifest = MANIFEST | {"shard": f"{i}/2", "planned": 40, "failed": i, "state": ("complete", "stopped")[i]}
        build(tmp_path, records[i::2], manifest, shard=(i, 2))
    statistics = collect(tmp_path, 0)
    assert statistics.tally.total == 60
    run = statistics.run
    assert (run.machines, run.planned, run.failed, run.elapsed) == (2, 80, 1, 20.0)
    text = page_of(tmp_path).text
    assert "complete, stopped: 60 of 80 planned samples, 1 failed" in text
    assert f"{statistics.tally.tokens / 20:,.1f}" in text and "tokens/s on each of 2 machines" in text


def test_the_choice_of_samples_is_fair():
    def choose(strata: dict, size: int) -> Counter:
        selection = Selection(size)
        rows = [(name, i) for name, count in strata.items() for i in range(count)]
        for name, i in rows:
            selection.offer(name, lambda name=name, i=i: {"stratum": name, "i": i})
        chosen = selection.rows()
        assert len(chosen) == min(size, len(rows)) and len({(r["stratum"], r["i"]) for r in chosen}) == len(chosen)
        assert size < 500 or 0.4 < np.mean([r["i"] for r in chosen if r["stratum"] is None]) / strata[None] < 0.6
        return Counter(row["stratum"] for row in chosen)

    a, b, c = ("f", "a"), ("f", "b"), ("g", "c")
    found = choose({None: 9000, a: 5000, b: 300, c: 5}, 205)
    assert found[None] in (102, 103) and found[c] == 5 and abs(found[a] - found[b]) <= 1
    assert choose({None: 20000}, 1000) == {None: 1000}
    assert choose({a: 2000, b: 2000}, 100) == {a: 50, b: 50}
    assert choose({a: 3, None: 4}, 100) == {a: 3, None: 4}
    assert choose({a: 3, None: 4}, 0) == {}


# -- verdicts ------------------------------------------------------------------------------------------------------


def marks(folder, **mixing) -> dict[str, tuple[str, str]]:
    statistics = collect(folder, 0)
    return {verdict.title: (verdict.mark, verdict.text) for verdict in [*judge(statistics), *self_check(statistics)]}


def balanced(rng, i: int, **values) -> Record:
    one = record(i, rng, **values)
    size = len(one.token_ids)
    series = {
        "alpha": rng.uniform(0.2, 0.8, size),
        "kl_to_student": np.full(size, 0.2),
        "kl_to_teacher": np.full(size, 0.2),
        "ess_ratio": np.exp(np.tile([0.1, -0.1], size)[:size]),
        "student_logprob": np.full(size, -0.5),
    }
    for name, values in series.items():
        setattr(one, name, values.tolist())
    return one


def test_a_good_run_is_green(tmp_path):
    rng = np.random.default_rng(0)
    found = marks(build(tmp_path, [balanced(rng, i) for i in range(20)], MANIFEST))
    assert {mark for mark, _ in found.values()} == {"good"}
    assert "ratio 1.000" in found["KL balance"][1] and "−0.500 nats" in found["Coverage by the student"][1]


def test_what_is_wrong_is_amber(tmp_path):
    rng = np.random.default_rng(0)
    records = []
    for i in range(40):
        strategy = ("hint", "copy")[i < 19]
        reject = ("deduplicate", "duplicate") if strategy == "hint" else None
        one = balanced(rng, i, strategy=strategy, reject=reject, finish_reason="length")
        size = len(one.token_ids)
        one.answer_probability = 0.05
        one.kl_to_student, one.ess_ratio = [0.4] * size, [10.0] * size
        if reject is None:
            one.student_logprob = [-8.0] * size
        one.alpha[: size // 2] = [0.1] * (size // 2)
        at_bound = 100 * (size // 2) / size
        records.append(one)
    manifest = {"config": {"mixing": {"alpha_method": "kl_symmetry", "alpha_min": 0.1, "alpha_max": 0.9}}}
    found = marks(build(tmp_path, records, manifest))
    assert {mark for mark, _ in found.values()} == {"warn"} and len(found) == 12
    assert "ratio 2.000" in found["KL balance"][1]
    assert f"{at_bound:.0f} % of tokens are at α = 0.1" in found["α at its bounds"][1]
    assert "`copy` has 100 %" in found["Prefix strategies"][1]


@pytest.mark.parametrize("method", ["ess_balance", "entropy", None])
def test_balances_are_judged_by_the_method(tmp_path, method):
    rng = np.random.default_rng(0)
    records = [balanced(rng, i) for i in range(4)]
    for one in records:
        one.kl_to_student = [0.4] * len(one.token_ids)
        one.ess_ratio = [1.3] * len(one.token_ids)
    found = marks(build(tmp_path, records, {"config": {"mixing": {"alpha_method": method}}}))
    assert found["KL balance"][0] == ("warn" if method is None else "none")
    assert found["ESS balance"][0] == ("warn" if method == "ess_balance" else "good")


@pytest.mark.parametrize("mixing", [{"fixed_alpha": 0.0}, {"alpha_method": "fixed"}])
def test_a_fixed_alpha_has_no_bounds(tmp_path, mixing):
    one = balanced(np.random.default_rng(0), 0)
    one.alpha = [0.0] * len(one.token_ids)
    found = marks(build(tmp_path, [one], {"config": {"mixing": mixing}}))
    assert found["α at its bounds"][0] == "none" and "over all tokens" in found["KL balance"][1]


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_budget_is_judged_by_what_was_used(tmp_path, side):
    """Between the bounds it is used up; at α = 0 and 1 no bound decides."""
    rng = np.random.default_rng(0)
    name = "kl_budget" if side == "student" else "kl_budget_teacher"
    records = [balanced(rng, i) for i in range(4)]
    for one in records:
        setattr(one, f"kl_to_{side}", [0.3] * len(one.token_ids))
        half = len(one.token_ids) // 2
        one.alpha[:half] = [1.0 if side == "student" else 0.0] * half
        getattr(one, f"kl_to_{side}")[:half] = [0.01] * half  # all fits there
    for budget, mark in ((0.3, "good"), (0.2, "warn")):
        folder = build(tmp_path / f"{budget}", records, {"config": {"mixing": {name: budget}}})
        found = marks(folder)
        assert found["KL budget"][0] == mark and f"KL(q‖{side}) is 0.3000" in found["KL budget"][1]
        assert "KL balance" not in found and found["α at its bounds"][0] == "good"
        assert f"{name} of {budget} nats, bounds 0 to 1" in page_of(folder).text
    bounds = {"alpha_max": 0.9} if side == "student" else {"alpha_min": 0.1}
    for one in records:
        one.alpha = [min(max(alpha, 0.1), 0.9) for alpha in one.alpha]
    clamped = build(tmp_path / "clamped", records, {"config": {"mixing": {name: 0.3, **bounds}}})
    assert marks(clamped)["α at its bounds"][0] == "warn"


def surprising(rng, i: int, count: int, *, answer: float | None = None, **values) -> Record:
    """With so many tokens of which the student thinks little."""
    one = balanced(rng, i, answer_probability=answer, **values)
    one.student_logprob[:count] = [-8.0] * count
    return one


def test_the_report_opens_with_what_came_of_the_run(tmp_path):
    rng = np.random.default_rng(0)
    records = [surprising(rng, i, int(i < 5)) for i in range(14)]
    for i, one in enumerate(records):
        one.id, one.problem_id = f"p{i // 4}/copy/{i}", f"p{i // 4}"
        if i % 4 and i < 8:
            rejected(one)
    # Of p0 the first is accepted, of p1 too, with a surprise; all of p2 (4) and p3 (2).
    folder = build(tmp_path / "some", records, MANIFEST | {"planned": 14})
    found = headline(collect(folder, 0))
    assert found.text == "8 of 14 accepted, 4 of 4 problems covered, 25 % of the accepted have a surprise."
    assert found.mark == "warn" and "Filter them before training" in found.next_step
    assert found.text in page_of(folder).text
    assert collect(folder, 0).tally.k_of_n == {1: 2, 2: 1, 4: 1}

    planned = headline(collect(build(tmp_path / "begun", records, MANIFEST), 0))
    assert planned.text.startswith("So far: 8 of 14 accepted")
    calm = [surprising(rng, i, 0) for i in range(4)]
    done = MANIFEST | {"planned": 4}
    assert "`distill export`" in headline(collect(build(tmp_path / "calm", calm, done), 0)).next_step
    for one in calm[1:]:
        rejected(one)
    few = headline(collect(build(tmp_path / "few", calm, done), 0))
    assert few.mark == "warn" and few.next_step.startswith("3 problems have no accepted sample")
    rejected(calm[0])
    none = headline(collect(build(tmp_path / "none", calm, done), 0))
    assert none.text == "0 of 4 accepted, 0 of 4 problems covered." and "what `answer` refused" in none.next_step


def test_surprises_are_counted_by_the_sample(tmp_path):
    """One token of 56 in a fifth of the samples is no share of tokens that alarms, and is a fifth of the data."""
    rng = np.random.default_rng(0)
    records = [surprising(rng, i, int(i % 5 == 0), answer=0.05 if i % 4 == 0 else 0.9) for i in range(20)]
    found = marks(build(tmp_path, records, MANIFEST))
    assert found["Surprises"][0] == "warn" and "4 of 20 accepted samples (20 %)" in found["Surprises"][1]
    assert (
        found["Leaps to the answer"][0] == "warn"
        and "In 5 of 20 accepted samples (25 %)" in found["Leaps to the answer"][1]
    )
    assert "What filtering did" not in found  # nothing was rejected


@pytest.mark.parametrize(("accepted_ones", "rejected_ones", "mark"), [(18, 2, "warn"), (4, 4, "good"), (2, 18, "good")])
def test_what_filtering_did(tmp_path, accepted_ones, rejected_ones, mark):
    rng = np.random.default_rng(0)
    records = [
        surprising(
            rng, i, int(i // 2 < (rejected_ones if i % 2 else accepted_ones)), reject=REASONS[1] if i % 2 else None
        )
        for i in range(40)
    ]
    verdict = marks(build(tmp_path, records, MANIFEST))["What filtering did"]
    assert verdict[0] == mark
    assert f"{5 * accepted_ones} % of accepted and {5 * rejected_ones} % of rejected samples" in verdict[1]


def test_more_often():
    assert more_often((33, 91), (20, 178)) and not more_often((2, 4), (1, 4)) and not more_often((1, 10), (1, 10))


def test_strategies_and_their_sound_samples(tmp_path):
    """Of those that came as far as `equations`."""
    rng = np.random.default_rng(0)
    rejects = [None, None, ("answer", "wrong answer"), ("sums", "a false equation"), ("deduplicate", "duplicate")]
    records = [
        surprising(rng, i, int(i == 0), reject=reject, strategy=("copy", "hint")[i // 5])
        for i, reject in enumerate([*rejects, None, None, None])
    ]
    filters = [{"type": "answer"}, {"type": "equations", "name": "sums"}, {"type": "deduplicate"}]
    labels = ["answer", "sums", "deduplicate"]
    manifest = {"filters": labels, "config": {"filters": filters, "mixing": {}}}
    text = page_of(build(tmp_path, records, manifest)).text
    assert "strategy samples accepted passed sums student logprob, nats with a surprise" in text
    assert "hint 3 3 (100 %; 44–100 %) 3 of 3 −0.500 0 of 3 (0 %)" in text
    size = len(records[0].token_ids)
    logprob = f"{-(0.5 * (2 * size - 1) + 8) / (2 * size):.3f}".replace("-", "−")
    assert f"copy 5 2 (40 %; 12–77 %) 3 of 4 {logprob} 1 of 2 (50 %)" in text


def test_the_self_check_is_folded_unless_it_fails(tmp_path):
    rng = np.random.default_rng(0)
    records = [balanced(rng, i) for i in range(3)]
    assert ("open", None) not in page_of(build(tmp_path / "good", records, MANIFEST)).of("self-check")
    for one in records:
        one.kl_to_student = [0.4] * len(one.token_ids)
    assert ("open", None) in page_of(build(tmp_path / "bad", records, MANIFEST)).of("self-check")


def test_problems_are_named_by_their_first_words():
    row = {"problem": "How  many\napples? " + "more " * 40, "student_messages": None, "student_text": "s", "id": "i"}
    assert problem_name(row).startswith("How many apples? more") and problem_name(row).endswith("more …")
    assert len(problem_name(row)) <= 92
    messages = [{"role": "system", "content": "x"}, {"role": "user", "content": "What is 3?"}]
    assert problem_name(row | {"problem": None, "student_messages": messages}) == "What is 3?"
    assert problem_name(row | {"problem": " ", "student_text": None}) == "i"


def test_wilson():
    low, high = wilson(8, 10)
    assert (low, high) == pytest.approx((0.490, 0.943), abs=1e-3)  # a textbook's example
    assert wilson(0, 5)[0] == 0.0 and wilson(5, 5)[1] == 1.0


# -- the page ------------------------------------------------------------------------------------------------------


def test_header_figures_and_reasons(tmp_path):
    records = mixed_records()
    page = page_of(build(tmp_path / "my run", records, MANIFEST))
    tokens = sum(len(one.token_ids) for one in records)
    for text in ("my run", "40 / 60", f"{tokens:,}", f"{flat(records, 'alpha').mean():.3f}", f"{tokens / 10:,.0f}",
                 "missing/teacher", "kl_symmetry, bounds 0 to 1", "complete: 60 of 60 planned samples",
                 "α by position in the sample", "KL by position", "Distribution of KL", "ESS ratio", "Coverage",
                 "Length of samples", "Filters, in their order", "Latency",
                 "after answer = accepted", "wrong answer", "Accepted samples of a problem", "greatest surprise",
                 "40 / 60 problems covered", "copy 30 20 (67 %; 49–81 %)"):  # fmt: skip
        assert text in page.text, text
    assert page.tags["figure"] == page.tags["svg"] == 11
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert len(page.samples) == 60 and {s["accepted"] for s in page.samples} == {True, False}
    assert len(page_of(tmp_path / "my run", samples=10).samples) == 10
    assert page_of(tmp_path / "my run", samples=0).data == ""


def test_labels_of_an_axis_are_no_tex(tmp_path):
    """Matplotlib labels what lies between two powers of ten by itself where there are few of these."""
    one = record(0, np.random.default_rng(0))
    one.student_logprob = [-3.0 if i % 3 else -1.0 for i in range(len(one.token_ids))]
    assert "mathdefault" not in write_report(build(tmp_path / "run", [one], MANIFEST)).read_text(encoding="utf-8")


def test_hostile_text_is_inert(tmp_path):
    rng = np.random.default_rng(0)
    fields = {"problem": HOSTILE, "answer": HOSTILE, HOSTILE: HOSTILE}
    common = {
        "fields": fields, "teacher_context": HOSTILE, "student_context": [{"role": HOSTILE, "content": HOSTILE}],
        "models": {"teacher_model": HOSTILE, "student_model": None},
    }  # fmt: skip
    records = [
        record(0, rng, text=HOSTILE, **common),
        record(1, rng, text=HOSTILE, reject=(HOSTILE, HOSTILE), strategy=HOSTILE, **common),
    ]
    page = page_of(build(tmp_path, records, MANIFEST | {"filters": [HOSTILE]}))
    assert page.tags["img"] == 0 and page.tags["script"] == 2
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert page.samples[0]["text"] == page.samples[0]["teacher"][0]["content"] == HOSTILE
    assert "49" not in page.text.split("What to look for")[1].split("Samples")[0]


def rejected(one: Record) -> None:
    one.accepted, one.rejected_by, one.reject_reason = False, "answer", "wrong answer"


def refused(one: Record) -> None:
    rejected(one)
    one.token_ids, one.text, one.latency, one.finish_reason, one.rejected_by = [], "", 0.0, "refused", "server"
    for name in SERIES:
        setattr(one, name, [])


def accepted(one: Record) -> None:
    one.accepted, one.rejected_by, one.reject_reason, one.strategy = True, None, None, "copy"


def fixed(one: Record) -> None:
    one.alpha = [-1.5] * len(one.token_ids)


@pytest.mark.parametrize(
    ("change", "manifest", "figures"),
    [(rejected, MANIFEST, 10), (accepted, {}, 10), (refused, MANIFEST, 1),
     (fixed, {"config": {"mixing": {"fixed_alpha": -1.5}}}, 11)],
)  # fmt: skip
def test_unusual_runs(tmp_path, change, manifest, figures):
    records = mixed_records()
    for one in records:
        change(one)
    page = page_of(build(tmp_path, records, manifest))
    assert page.tags["figure"] == figures
    assert len(page.samples) == 60 and "nan" not in page.text.lower()
    if change is fixed:
        assert "−1.500 mean α" in page.text and "fixed at -1.5" in page.text
        found = collect(tmp_path, 0).by_position["alpha"].quantiles(np.array([0]), [0.1, 0.9], -1.5, -1.5)
        assert (found == -1.5).all()
    if change is refused:
        assert "The server refuses most: 60 of 60" in page.text


def test_without_series(tmp_path):
    records = mixed_records()
    page = page_of(build(tmp_path, records, MANIFEST, series=False))
    assert "output.series: false" in page.text
    assert f"{flat(records, 'kl_to_student').mean():.3f} | {flat(records, 'kl_to_teacher').mean():.3f}" in page.text
    assert set(page.samples[0]["series"]) == {"alpha"}
    statistics = collect(tmp_path, 0)
    for group, accepted in ((statistics.accepted, True), (statistics.rejected, False)):
        members = [one for one in records if one.accepted is accepted]
        assert group.logprob.value == pytest.approx(flat(members, "student_logprob").mean())
    assert page.tags["figure"] == 7


# -- tokens --------------------------------------------------------------------------------------------------------


def test_texts_of_tokens(tmp_path):
    tokenizer = build_small_tokenizer(tmp_path / "tokenizer")
    rng = np.random.default_rng(0)
    records = [record(i, rng, models={"student_model": str(tokenizer)}) for i in range(3)]
    page = page_of(build(tmp_path / "run", records, MANIFEST))
    for sample in page.samples:
        assert "".join(sample["pieces"]) == TEXT + EOS
        assert sample["special"] == [len(TEXT)] and len(sample["pieces"]) == len(sample["ids"])
    assert "no-tokenizer" not in dict.fromkeys(value for name, value in page.attributes if name == "id")
    other = page_of(build(tmp_path / "other", mixed_records(), MANIFEST))
    assert other.samples[0]["pieces"] is None and "--tokenizer" in other.text
    assert page_of(tmp_path / "other", tokenizer=str(tokenizer)).samples[0]["pieces"] is not None


def test_another_models_tokenizer(tmp_path):
    tokenizer = build_small_tokenizer(tmp_path / "tokenizer")
    one = record(0, np.random.default_rng(0), models={"student_model": str(tokenizer)})
    one.token_ids = one.token_ids[::-1]
    build(tmp_path / "run", [one], MANIFEST)
    assert page_of(tmp_path / "run").samples[0]["pieces"] is None
    assert "another model's" in page_of(tmp_path / "run", tokenizer=str(tokenizer)).text


def test_pieces_of_split_characters():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = "naïve 🙂 12€ 三\n"
    ids = tokenizer.encode(text).ids
    pieces = token_pieces(lambda part: tokenizer.decode(list(part)), ids)
    assert "".join(pieces) == text and len(pieces) == len(ids) == len(text.encode())
    assert pieces.count("") == len(text.encode()) - len(text)
    broken = token_pieces(lambda part: tokenizer.decode(list(part)), ids[:8] * 3)  # ends in half a character
    assert len(broken) == 24


def test_long_samples_are_cut():
    assert token_limit([10, 20, 1000], 130) == 100
    assert token_limit([10, 20], 100) == 20
    assert token_limit([50, 50, 50, 50], 100) == 25
    assert token_limit([], 100) == token_limit([0], 100) == 1


# -- what goes wrong -------------------------------------------------------------------------------------------------


def test_errors_name_the_problem(tmp_path):
    with pytest.raises(ValueError, match="no run in it"):
        write_report(tmp_path / "nothing")
    with pytest.raises(ValueError, match="no records"):
        write_report(build(tmp_path / "empty", [], MANIFEST))
    run = build(tmp_path / "run", mixed_records(), MANIFEST)
    with pytest.raises(ValueError, match="'no/such' is no tokenizer"):
        write_report(run, tokenizer="no/such")
    with pytest.raises(ValueError, match="samples"):
        write_report(run, samples=-1)
    assert not (run / "report.html").exists()
    next((run / "data").iterdir()).write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match=r"data/accepted.*damaged"):
        write_report(run)
    (run / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json.*damaged"):
        write_report(run)


def test_another_output(tmp_path):
    run = build(tmp_path / "run", mixed_records(), MANIFEST)
    output = write_report(run, tmp_path / "new" / "r.html")
    assert output == tmp_path / "new" / "r.html" and output.stat().st_size > 10_000


# -- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def driver():
    pytest.importorskip("selenium", reason="selenium is not installed")
    from browser import CHROMEDRIVER, CHROMIUM, chromium

    if CHROMIUM is None or CHROMEDRIVER is None:
        pytest.skip("chromium and chromedriver are not installed")
    with chromium() as running:
        yield running


@pytest.fixture
def opened(driver, tmp_path):
    def open_page(records, manifest=MANIFEST, **options):
        path = write_report(build(tmp_path / "run", records, manifest), **options)
        driver.get(path.as_uri())
        return driver

    yield open_page
    assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []


def css(driver, selector: str) -> list:
    return driver.find_elements("css selector", selector)


def fill(driver, name: str, value: str) -> None:
    driver.execute_script(
        "const f = document.getElementById(arguments[0]); f.value = arguments[1];"
        "f.dispatchEvent(new Event('input', {bubbles: true}))", name, value,
    )  # fmt: skip


def listed(driver) -> list[str]:
    return [entry.get_attribute("data-id") for entry in css(driver, "#list button")]


def tip(driver) -> dict[str, str]:
    rows = css(driver, "#tip:not([hidden]) tr")
    return {css(row, "th")[0].text.replace("−", "-"): css(row, "td")[0].text.replace("−", "-") for row in rows}


def test_browsing(opened, tmp_path):
    tokenizer = build_small_tokenizer(tmp_path / "tokenizer")
    records = mixed_records()
    driver = opened(records, tokenizer=str(tokenizer))
    by_id = {one.id: one for one in records}
    assert sorted(listed(driver)) == sorted(by_id)

    for name, value, chosen in (
        ("verdict", "rejected", lambda one: not one.accepted),
        ("reason", "answer: wrong answer", lambda one: one.reject_reason == "wrong answer"),
        ("strategy", "hint", lambda one: one.strategy == "hint"),
        ("search", "The Answer is 7.", lambda one: one.problem_id == "p7"),
        ("search", "no such text", lambda one: False),
    ):
        fill(driver, name, value)
        expected = {one.id for one in records if chosen(one)}
        assert set(listed(driver)) == expected
        assert driver.find_element("id", "count").text == f"{len(expected)} of 60 samples"
        fill(driver, name, "")

    def value(name):
        return lambda one: len(one.token_ids) if name is None else np.mean(getattr(one, name))

    sorts = [
        lambda one: -min(one.student_logprob), lambda one: sum(p < np.log(1e-3) for p in one.student_logprob), None,
        *(value(name) for name in ("alpha", "kl_to_student", "kl_to_teacher", None, "student_logprob")),
    ]  # fmt: skip
    for reverse in (True, False):
        for i, key in enumerate(sorts):
            if key is None:
                continue  # no answer's probability is known
            fill(driver, "sort", str(i))
            values = [key(by_id[name]) for name in listed(driver)]
            assert np.allclose(values, sorted(values, reverse=reverse), atol=2e-3), i
        driver.find_element("id", "direction").click()


def test_a_samples_tokens(opened, tmp_path):
    from selenium.webdriver import ActionChains, Keys

    tokenizer = build_small_tokenizer(tmp_path / "tokenizer")
    rng = np.random.default_rng(0)
    records = [record(i, rng) for i in range(3)]
    driver = opened(records, tokenizer=str(tokenizer))
    fill(driver, "sort", "8")  # as they are stored
    css(driver, "#list button")[1].click()
    one = records[1]
    assert css(driver, "#detail h3")[0].text == one.fields["problem"]
    details = css(driver, "#detail details")
    assert [css(d, "summary")[0].text for d in details] == [
        "Answer", "What they read", "Problem", "Teacher context", "Student context", "Other fields",
    ]  # fmt: skip
    details[3].find_element("css selector", "summary").click()
    assert details[3].text == "Teacher context\nuser\nproblem 1? the answer is 1."
    tokens = css(driver, "#detail .text .token")
    assert "".join(t.get_property("textContent") for t in tokens) == TEXT + EOS
    assert [i for i, t in enumerate(tokens) if "end" in t.get_attribute("class").split()] == [len(TEXT)]

    ActionChains(driver).move_to_element(tokens[4]).perform()
    labels = {"α": "alpha", "log p, teacher": "teacher_logprob", "log p, student": "student_logprob",
              "log p, mixture": "mixture_logprob", "KL to student": "kl_to_student", "KL to teacher": "kl_to_teacher",
              "ESS ratio": "ess_ratio"}  # fmt: skip

    def check(place: int) -> None:
        shown = tip(driver)
        probability = float(shown.pop("p, student").replace("−", "-"))
        assert probability == pytest.approx(np.exp(one.student_logprob[place]), rel=0.06)
        pull = one.teacher_logprob[place] - one.student_logprob[place]
        assert float(shown.pop("pull, teacher − student".replace("−", "-"))) == pytest.approx(pull, abs=2e-3)
        assert shown.pop("token") == f"{place + 1} of {len(tokens)}, id {one.token_ids[place]}"
        assert shown.keys() == labels.keys()
        for label, name in labels.items():
            assert float(shown[label]) == pytest.approx(getattr(one, name)[place], rel=1e-3, abs=1e-4)

    check(4)
    # By keyboard: one stop for Tab, arrows inside, and the tip goes with Escape.
    ActionChains(driver).move_to_element(css(driver, "#detail h3")[0]).perform()
    assert tip(driver) == {}
    driver.execute_script("arguments[0].focus()", tokens[0])
    for key, place in ((Keys.ARROW_RIGHT, 1), (Keys.ARROW_RIGHT, 2), (Keys.ARROW_LEFT, 1), (Keys.END, len(tokens) - 1)):
        driver.switch_to.active_element.send_keys(key)
        check(place)
    assert [t.get_property("tabIndex") for t in tokens].count(0) == 1
    driver.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert tip(driver) == {}

    # Students' tokens are blue, teachers' orange.
    fill(driver, "colour", "alpha")
    tokens = css(driver, "#detail .text .token")
    for token, alpha in zip(tokens, one.alpha, strict=True):
        colour = token.value_of_css_property("background-color")
        red, _, blue = (float(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3])
        assert abs(alpha - 0.5) < 0.01 or (red > blue) == (alpha > 0.5)

    css(driver, "#list button")[1].send_keys(Keys.ARROW_DOWN)
    assert css(driver, "#detail h3")[0].text == records[2].fields["problem"]


def test_colours_and_what_both_read(opened, tmp_path):
    tokenizer = build_small_tokenizer(tmp_path / "tokenizer")
    rng = np.random.default_rng(0)
    one = record(
        0, rng, student_context=[{"role": "user", "content": "problem 0? Be brief."}],
        teacher_context=[{"role": "user", "content": "problem 0?\n\nThe answer is <b>0</b>."}],
    )  # fmt: skip
    size = len(one.token_ids)
    one.student_logprob, one.teacher_logprob = [-0.01] * size, [-0.01] * size
    one.student_logprob[3], one.student_logprob[4], one.teacher_logprob[5] = -9.0, float("-inf"), -9.0
    one.kl_to_student = [0.0] * 6 + [3.0] + [0.0] * (size - 7)
    driver = opened([one], tokenizer=str(tokenizer))

    def strengths(choice: str | None) -> dict[int, str]:
        if choice:
            fill(driver, "colour", choice)
        colours = [token.value_of_css_property("background-color") for token in css(driver, "#detail .text .token")]
        return {i: colour for i, colour in enumerate(colours) if colour.endswith("0.62)")}

    assert strengths(None).keys() == {3, 4}  # by surprise
    pull = strengths("pull")
    assert pull.keys() == {3, 4, 5} and pull[3] == pull[4] != pull[5]
    assert strengths("kl").keys() == {6} and driver.find_element("id", "high").text == "2 nats"
    marked = css(driver, "#detail .token.rare")
    assert [token.get_property("textContent") for token in marked] == [TEXT[3], TEXT[4]]
    assert [part.text for part in css(driver, ".diff ins")] == ["The answer is <b>0</b>."]
    assert [part.text for part in css(driver, ".diff del")] == ["Be brief."]
    assert css(driver, ".diff")[0].text.startswith("user:\nproblem 0?")
    assert [key.text for key in css(driver, "#detail .key")] == ["the teacher alone", "the student alone"]
    assert "least p 0 " in css(driver, "#list button")[0].text  # −inf


@pytest.mark.parametrize("width", [390, 768, 1600])
def test_nothing_is_wider_than_the_screen(opened, width):
    driver = opened(mixed_records())
    try:
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        assert driver.execute_script("return document.documentElement.scrollWidth") <= width
        tops = [card.location["y"] for card in css(driver, ".numbers .card")]
        assert tops.count(tops[0]) == (2 if width < 620 else 3)
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_strips_and_hostile_text(opened):
    rng = np.random.default_rng(0)
    common = {"fields": {"problem": HOSTILE, "answer": HOSTILE}, "teacher_context": HOSTILE}
    one = record(0, rng, text=HOSTILE, reject=("answer", HOSTILE), **common)
    one.alpha = [-3.0, *one.alpha[1:-1], 4.0]  # no colour is stronger than that of 0 or 1
    driver = opened([one])
    assert driver.title == "run: distillation report"
    assert css(driver, "img") == [] and len(css(driver, "script")) == 2
    assert css(driver, "#detail > p.plain")[0].get_property("textContent") == HOSTILE
    fill(driver, "colour", "alpha")
    cells = css(driver, "#detail .strip .token")
    assert len(cells) == len(one.token_ids) and cells[0].text == ""
    driver.execute_script("arguments[0].focus()", cells[0])
    assert float(tip(driver)["α"]) == -3.0
    blue, orange = (cell.value_of_css_property("background-color") for cell in (cells[0], cells[-1]))
    assert blue.endswith("0.62)") and orange.endswith("0.62)") and blue != orange

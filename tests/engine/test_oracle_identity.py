"""Greedy output of the real engine is token-identical to a plain transformers loop, whatever the scheduler does.

Every scenario runs on five engines: roomy with overlap scheduling; overlap with tiny chunks and a pool so small that
requests are retracted; the same without overlap, and without radix caches; and small pools of pages of 16 and of 64
tokens. Each of them with two models, with two of which the student drafts, and with one whose weights both sides share;
some where the student is a LoRA adapter on the shared weights. Small pools but those of large pages imitate a GPU
(tests/gpu_like), with two models of one vocabulary size.
"""

from __future__ import annotations

import asyncio
import random
import re

import pytest
import torch
from gpu_like.engines import gpu_state, start_gpu_like
from harness import TIE, Case, check_all, check_greedy, check_pools, mixing_state, random_cases, random_ids, run, start
from oracle import filter_probs, mix
from series_oracle import check_series, check_top_k, entry_of

from sglang_optimal.names import ALL_SERIES, SIDES

SMALL = {"chunked_prefill_size": 16, "max_total_tokens": 400, "schedule_conservativeness": 0.05}
ENGINES = {
    "roomy": {},
    "small": SMALL,
    "small-no-overlap": {**SMALL, "disable_overlap_schedule": True, "disable_radix_cache": True},
    "pages": {**SMALL, "page_size": 16, "max_total_tokens": 480},
    "large-pages": {
        **SMALL,
        "page_size": 64,
        "chunked_prefill_size": 64,
        "max_total_tokens": 512,
        "disable_overlap_schedule": True,
    },
}


# One pool holds both contexts there, and a forward of 6 requests has up to 12 rows.
SHARED = {
    name: arguments and {**arguments, "max_total_tokens": 1024 if "large" in name else 520, "max_running_requests": 6}
    for name, arguments in ENGINES.items()
}


LORA = {"roomy": {}, "small": SHARED["small"]}
DRAFTS = {name: {**arguments, "mixing_mode": "speculative", "draft_tokens": 3} for name, arguments in ENGINES.items()}
MODES = {"": ENGINES, "shared-": SHARED, "lora-": LORA, "drafts-": DRAFTS}
ONE_MODEL = ("shared-", "lora-")
GPU_LIKE = ("small", "small-no-overlap", "pages")


SLOW = (
    "roomy",  # also tests/engine/test_two_engines.py
    "small-no-overlap",
    "shared-roomy",
    "shared-small",  # with pages in every run; without them in tests/gpu_like, test_sampling.py and the soak
    "drafts-small",
    "shared-small-no-overlap",
    "drafts-roomy",
    "drafts-small-no-overlap",
    "lora-roomy",
    "large-pages",
    "shared-large-pages",
    "drafts-large-pages",
)
NAMES = [f"{mode}{name}" for mode, engines in MODES.items() for name in engines]


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in NAMES]
)
def sampler(request, tiny_pair):
    mode = next(mode for mode in reversed(MODES) if request.param.startswith(mode))
    name = request.param.removeprefix(mode)
    arguments = dict(MODES[mode][name])
    pair = (tiny_pair[0], tiny_pair[0]) if mode in ONE_MODEL else tiny_pair
    if mode == "lora-":
        arguments["student_lora_path"] = str(request.getfixturevalue("lora_adapter")[0])
    begin = start
    if name in GPU_LIKE:
        begin = start_gpu_like
        pair = pair if mode in ONE_MODEL else request.getfixturevalue("same_vocabulary_pair")
    with begin(pair, **arguments) as engine:
        assert mixing_state(engine)["shared_weights"] is (mode in ONE_MODEL)
        engine.name, engine.mode, engine.page_size = name, mode, arguments.get("page_size", 1)
        yield engine
        if name in GPU_LIKE:
            state = gpu_state(engine)
            assert state["host_waits"] == {} and state["replays"] > 0


@pytest.fixture
def oracle(sampler, request):
    if sampler.mode == "lora-":
        return request.getfixturevalue("lora_adapter")[1]
    if sampler.mode in ONE_MODEL:
        return request.getfixturevalue("self_oracle")
    return request.getfixturevalue("same_vocabulary_oracle" if sampler.name in GPU_LIKE else "tiny_oracle")


@pytest.fixture(autouse=True)
def pools_are_full_again(sampler):
    yield
    check_pools(sampler)


def test_one_mixed_request(sampler, oracle):
    cases = random_cases(1, 1, 0)
    check_all(oracle, cases, run(sampler, cases))


def test_batch_of_mixed_and_plain(sampler, oracle):
    cases = random_cases(2, 10, 4)
    check_all(oracle, cases, run(sampler, cases))


def test_only_plain(sampler, oracle):
    cases = random_cases(3, 0, 5)
    check_all(oracle, cases, run(sampler, cases))


def test_long_prompts_are_chunked(sampler, oracle):
    """Both contexts, the teacher's alone, and the student's alone need many chunks of 16."""
    rng = random.Random(4)
    lengths = ((150, 170), (120, 3), (2, 140), (33, 32))
    cases = [Case(random_ids(rng, t), random_ids(rng, s), 8) for t, s in lengths]
    check_all(oracle, cases, run(sampler, cases))


def test_prefix_hits(sampler, oracle):
    """Contexts that share prefixes with earlier ones: on both sides, on one side, completely, and within a batch."""
    rng = random.Random(5)
    shared_t, shared_s = random_ids(rng, 40), random_ids(rng, 30)
    first = [Case(shared_t, shared_s, 10)]
    first_output = run(sampler, first)
    check_all(oracle, first, first_output)
    before = mixing_state(sampler)["student_pool"]["cached_prompt_tokens_total"]
    grown_s = shared_s + first_output[0]["output_ids"]
    cases = [
        Case(shared_t, shared_s, 10),
        Case(shared_t + random_ids(rng, 5), shared_s + random_ids(rng, 9), 8),
        Case(random_ids(rng, 12), shared_s + random_ids(rng, 2), 8),
        Case(shared_t + random_ids(rng, 3), random_ids(rng, 12), 8),
        Case(random_ids(rng, 9), grown_s + random_ids(rng, 3), 8),  # generated tokens were cached too
        Case(shared_t, None, 8),
    ]
    check_all(oracle, cases, run(sampler, cases))
    hits = mixing_state(sampler)["student_pool"]["cached_prompt_tokens_total"] - before
    if sampler.name == "small-no-overlap":
        assert hits == 0
    else:
        page = sampler.page_size
        assert hits >= sum((len(ids) - 1) // page * page for ids in (shared_s, shared_s, shared_s, grown_s))
    again = run(sampler, cases)
    check_all(oracle, cases, again)


SETTINGS = {
    "greedy": {"temperature": 0.0},
    "plain": {"temperature": 1.0},
    "filtered": {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.02},
}
# One of them for every engine; all of them take minutes on the imitated GPU.
every_setting = pytest.mark.parametrize(
    "settings",
    [
        pytest.param(own, id=name, marks=() if name == "filtered" else pytest.mark.slow)
        for name, own in SETTINGS.items()
    ],
)


@every_setting
def test_every_series_and_the_most_likely_tokens(sampler, oracle, settings):
    """Of requests that ask for different things, with logit bias and a grammar, and with penalties beside them."""
    rng = random.Random(71)
    cases = [Case(random_ids(rng, 20), random_ids(rng, 12), 9, alpha) for alpha in ({}, {"fixed_alpha": 1.3}, {})]
    cases[1].bias = {9: -50.0, 12: 3.0, 30: 1.5}
    asked = [
        {"return_mixing_info": list(ALL_SERIES), "return_top_k": 5, "top_k_of": list(SIDES)},
        {"return_mixing_info": list(reversed(ALL_SERIES)), "return_top_k": 80, "top_k_of": "mixture"},
        {"return_mixing_info": ["student_rank", "kl_to_teacher"], "return_top_k": 1},
        {},
    ]
    params = [case.params(**settings) for case in [*cases, cases[0]]]
    params[2] |= {"regex": "[a-f]{9}"}
    params[3] |= {"frequency_penalty": 0.5}
    for own, fields in zip(params, asked, strict=True):
        own["custom_params"] = {k: v for k, v in own["custom_params"].items() if k != "return_mixing_info"} | fields
    outputs = sampler.engine.generate(input_ids=[case.teacher for case in [*cases, cases[0]]], sampling_params=params)
    filters = {name: value for name, value in settings.items() if name != "temperature"}
    temperature = settings["temperature"] or 1.0
    for case, output in zip(cases[:2], outputs, strict=False):
        meta, ids = output["meta_info"], output["output_ids"]
        assert len(ids) == case.n and all(len(meta[name]) == case.n for name in ALL_SERIES)
        for i, token in enumerate(ids):
            logits = oracle.next_logits(case.teacher, case.student, ids[:i], case.bias)
            alpha = {"alpha_method": "fixed", **case.alpha} if case.alpha else {}
            step = mix(*logits, temperature=temperature, **alpha)
            behaviour = filter_probs(step.mixture.exp(), **filters)
            if settings["temperature"] == 0.0:
                behaviour = torch.ones_like(behaviour)
            check_series({name: meta[name][i] for name in ALL_SERIES}, step, token, behaviour, 1e-3)
            if case is cases[0]:
                for side in SIDES:
                    check_top_k(entry_of(meta["top_k"], side, i), side, 5, step, 1e-3)
            else:
                assert list(meta["top_k"]) == ["mixture"]
                check_top_k(entry_of(meta["top_k"], "mixture", i), "mixture", 80, step, 1e-3)
    meta = outputs[2]["meta_info"]
    assert {name for name in ALL_SERIES if name in meta} == {"alpha", "student_rank", "kl_to_teacher"}
    assert list(meta["top_k"]) == ["teacher", "student"] and len(meta["top_k"]["student"]["ids"]) == 9
    assert all(1 <= rank <= 6 for rank in meta["student_rank"])  # of what the grammar allows
    meta = outputs[3]["meta_info"]
    assert [name for name in (*ALL_SERIES, "top_k") if name in meta] == ["alpha"]


@every_setting
def test_scores_of_given_completions(sampler, oracle, settings):
    """Of a sample's own tokens they are its series; of others what the oracle says. In chunks of 16, with prefixes that
    the caches have and contexts that begin alike, beside requests that generate; twice, when all is cached."""
    rng = random.Random(72)
    alphas = ({}, {"fixed_alpha": 1.3}, {"alpha_method": "entropy", "alpha_min": 0.2})
    sizes = ((20, 12, 14), (3, 45, 30), (33, 33, 1))
    cases = [Case(random_ids(rng, t), random_ids(rng, s), n, a) for (t, s, n), a in zip(sizes, alphas, strict=True)]
    same = random_ids(rng, 40)
    cases.append(Case(same + random_ids(rng, 2), same + random_ids(rng, 3), 9))
    cases.append(Case(same, same, 5))
    cases[1].bias = {9: -50.0, 12: 3.0}
    asked = {"return_mixing_info": list(ALL_SERIES), "return_top_k": 4, "top_k_of": list(SIDES)}
    params = [case.params(**settings) for case in cases]
    for own in params:
        own["custom_params"] |= asked
    ids = [case.teacher for case in cases]
    drawn = sampler.engine.generate(input_ids=ids, sampling_params=params)
    given = [output["output_ids"] for output in drawn] + [random_ids(rng, 21)]
    scoring = [{**own, "max_new_tokens": 0} for own in [*params, params[0]]]
    for own, completion in zip(scoring, given, strict=True):
        own["custom_params"] = {**own["custom_params"], "completion_input_ids": completion}
    beside = random_cases(73, 2, 2, longest=20)
    batch = [*ids, ids[0], *(case.teacher for case in beside)]
    for _ in range(2):
        outputs = sampler.engine.generate(
            input_ids=batch, sampling_params=[*scoring, *(case.params() for case in beside)]
        )
        check_all(oracle, beside, outputs[len(given) :])
        for case, sample, output in zip(cases, drawn, outputs, strict=False):
            meta = output["meta_info"]
            assert output["output_ids"] == sample["output_ids"] and output["text"] == sample["text"]
            assert meta["completion_tokens"] == case.n and meta["prompt_tokens"] == len(case.teacher)
            for name in ALL_SERIES:
                assert meta[name] == pytest.approx(sample["meta_info"][name], abs=2e-4, rel=2e-4), name
            for side in SIDES:
                assert meta["top_k"][side]["ids"] == sample["meta_info"]["top_k"][side]["ids"]
        meta, case = outputs[len(cases)]["meta_info"], cases[0]
        for i, token in enumerate(given[-1]):
            step = mix(
                *oracle.next_logits(case.teacher, case.student, given[-1][:i]),
                temperature=settings["temperature"] or 1.0,
            )
            behaviour = filter_probs(step.mixture.exp(), **{k: v for k, v in settings.items() if k != "temperature"})
            if settings["temperature"] == 0.0:
                best = step.mixture.topk(2)
                assert best.values[0] - best.values[1] > TIE
                behaviour = torch.zeros_like(behaviour).index_fill(0, best.indices[:1], 1.0)
            values = {name: meta[name][i] for name in ALL_SERIES}
            if behaviour[token] == 0.0:  # which could not have been drawn
                assert values.pop("behaviour_logprob") == -torch.inf
                values["behaviour_logprob"], behaviour = 0.0, torch.ones_like(behaviour)
            check_series(values, step, token, behaviour, 1e-3)
            check_top_k(entry_of(meta["top_k"], "student", i), "student", 4, step, 1e-3)


def test_one_request_shares_a_prefix_with_itself(sampler, oracle):
    """Contexts that begin alike: apart after a while, one the other's beginning, equal; twice in one batch."""
    rng = random.Random(12)
    common = random_ids(rng, 45)
    other = random_ids(rng, 40)
    cases = [
        Case(common + random_ids(rng, 7), common + random_ids(rng, 9), 12),
        Case(common + random_ids(rng, 20), common + random_ids(rng, 2), 1),
        Case(other, other + random_ids(rng, 6), 10),
        Case(other + random_ids(rng, 5), other, 10),
        Case(*[random_ids(rng, 38)] * 2, 10),
        Case(random_ids(rng, 10), None, 6),
    ]
    before = mixing_state(sampler)["student_pool"]["cached_prompt_tokens_total"]
    check_all(oracle, cases, run(sampler, cases))
    computed_once = mixing_state(sampler)["student_pool"]["cached_prompt_tokens_total"] - before
    if sampler.mode == "shared-" and sampler.name in ("roomy", "small-no-overlap"):
        # else chunks and pages leave remainders too short to be worth it
        assert computed_once >= 2 * 45 + 40 + 39 + 37
    check_all(oracle, cases, run(sampler, cases))


def test_retraction(sampler, oracle):
    """Many long generations: the small pools overflow, and retracted requests come back with both contexts."""
    tokens = (60, 70) if sampler.page_size < 64 else (200, 210)  # of several pages
    cases = random_cases(6, 9, 3, longest=25, tokens=tokens)
    for case in cases:
        case.bias = {2: -100.0}
    # Not ignore_eos: SGLang reserves the full length of such requests, and never has to retract.
    outputs = run(sampler, cases, ignore_eos=False)
    check_all(oracle, cases, outputs)
    retracted = sum(
        o["meta_info"]["num_retractions"] > 0 for o, c in zip(outputs, cases, strict=True) if c.student is not None
    )
    if sampler.name == "roomy":
        assert retracted == 0
    else:
        assert retracted > 0


def test_lopsided_contexts(sampler, oracle):
    """Long teachers with short students and the other way round: either pool is the one that runs out."""
    rng = random.Random(11)
    cases = [
        Case(random_ids(rng, t), random_ids(rng, s), rng.randint(30, 40), bias={2: -100.0})
        for t, s in [(110, 4), (3, 120)] * 4 + [(90, 90)] * 2
    ]
    cases.append(Case(random_ids(rng, 100), None, 30, bias={2: -100.0}))
    check_all(oracle, cases, run(sampler, cases, ignore_eos=False))


@pytest.mark.parametrize("teacher,student", [(900, 3), (3, 900), (600, 600)])
def test_a_request_that_can_never_fit(sampler, oracle, teacher, student):
    """Refused at once, also while others run; what fits only just, runs alone and ends with the room."""
    if sampler.name == "roomy":
        teacher, student = 2 * teacher, 2 * student  # beyond the context length
    rng = random.Random(12)
    cases = random_cases(13, 3, 1)

    async def everything():
        bad = sampler.engine.async_generate(
            input_ids=random_ids(rng, teacher), sampling_params=Case([], random_ids(rng, student), 8).params()
        )
        good = [sampler.engine.async_generate(input_ids=case.teacher, sampling_params=case.params()) for case in cases]
        return await asyncio.gather(*good, bad, return_exceptions=True)

    *outputs, error = sampler.engine.loop.run_until_complete(everything())
    assert isinstance(error, ValueError), error
    check_all(oracle, cases, outputs)


def test_aborts_in_flight(sampler, oracle):
    """Requests aborted in the queue, in prefill and in decode leave nothing behind and disturb nobody."""
    cases = random_cases(7, 8, 3, longest=80, tokens=(40, 50))

    async def one(i: int, case: Case) -> dict:
        stream = await sampler.engine.async_generate(
            input_ids=case.teacher, sampling_params=case.params(), rid=f"abort-{i}", stream=True
        )
        count = 0
        async for chunk in stream:  # noqa: B007 (the last one is returned)
            count += 1
            if i % 3 == 0 and count == 1 + 4 * (i // 3):
                sampler.engine.tokenizer_manager.abort_request(f"abort-{i}")
        return chunk

    async def at_once(i: int, case: Case) -> None:
        # Aborted before any answer: still queued, or between two chunks of its prefill.
        rid = f"early-{i}"
        task = asyncio.ensure_future(
            sampler.engine.async_generate(input_ids=case.teacher, sampling_params=case.params(), rid=rid)
        )
        await asyncio.sleep(0.002 * i)
        sampler.engine.tokenizer_manager.abort_request(rid)
        await task

    async def everything() -> list[dict]:
        early = [at_once(i, case) for i, case in enumerate(random_cases(8, 6, 0, longest=150))]
        done = await asyncio.gather(*[one(i, case) for i, case in enumerate(cases)], *early)
        return done[: len(cases)]

    outputs = sampler.engine.loop.run_until_complete(everything())
    aborted = 0
    for i, (case, output) in enumerate(zip(cases, outputs, strict=True)):
        if output["meta_info"]["finish_reason"]["type"] == "abort":
            assert i % 3 == 0
            aborted += 1
            if case.student is not None:
                assert len(output["meta_info"]["alpha"]) == len(output["output_ids"]) < case.n
        else:
            check_greedy(oracle, case, output)
    assert aborted >= 2


def test_staggered_arrivals(sampler, oracle):
    """Requests join and leave the running batch at different steps."""
    cases = random_cases(9, 10, 4, tokens=(3, 30))

    async def late(i: int, case: Case) -> dict:
        await asyncio.sleep(0.03 * i)
        return await sampler.engine.async_generate(input_ids=case.teacher, sampling_params=case.params())

    async def everything() -> list[dict]:
        return await asyncio.gather(*[late(i, case) for i, case in enumerate(cases)])

    check_all(oracle, cases, sampler.engine.loop.run_until_complete(everything()))


def test_adapters_are_not_changed_beside_a_student(sampler, oracle, tmp_path):
    """One that is loaded would move the student's own, and one that is unloaded would be the student's."""
    said = "student's adapter|no \\*.safetensors" if sampler.mode == "lora-" else "LoRA is not enabled"
    for result in (
        sampler.engine.load_lora_adapter("other", str(tmp_path)),
        sampler.engine.unload_lora_adapter("student"),
        sampler.engine.load_lora_adapter_from_tensors("other", {"x": torch.zeros(1)}, {"r": 1}),
    ):
        assert not result.success and re.search(said, result.error_message), result
    cases = random_cases(97, 2, 1)
    check_all(oracle, cases, run(sampler, cases))


def test_eos_ends_both_contexts(sampler, oracle):
    """A stop token is kept in token_ids and ends the request in the middle of others."""
    cases = random_cases(10, 6, 2, tokens=(30, 40))
    greedy = run(sampler, cases)
    stops = [output["output_ids"][5] for output in greedy]
    outputs = sampler.engine.generate(
        input_ids=[case.teacher for case in cases],
        sampling_params=[
            {**case.params(), "ignore_eos": False, "stop_token_ids": [stop]}
            for case, stop in zip(cases, stops, strict=True)
        ],
    )
    for case, stop, full, output in zip(cases, stops, greedy, outputs, strict=True):
        end = full["output_ids"].index(stop) + 1
        eos = [i for i, token in enumerate(full["output_ids"]) if token == 2]
        end = min([end] + [i + 1 for i in eos])
        assert output["output_ids"] == full["output_ids"][:end]
        assert output["meta_info"]["finish_reason"]["type"] == "stop"
        if case.student is not None:
            assert output["meta_info"]["alpha"] == pytest.approx(full["meta_info"]["alpha"][:end], abs=1e-5)

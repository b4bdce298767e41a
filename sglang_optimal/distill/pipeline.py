"""A run: problems in, records out."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import datetime
import json
import time
import uuid
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from sglang_optimal import __version__
from sglang_optimal.distill.card import renew_card, write_card
from sglang_optimal.distill.client import BadRequestError, NoServerAvailable, RetriesExhausted, Sample, Servers
from sglang_optimal.distill.config import DistillConfig
from sglang_optimal.distill.contexts import ContextBuilder, Task
from sglang_optimal.distill.filters import FilterChain, Rejection
from sglang_optimal.distill.mentions import AnswerField
from sglang_optimal.distill.one_model import MISSING, asked, check_filters, needs, own_server, planned, side_of
from sglang_optimal.distill.passes import ALONE
from sglang_optimal.distill.problems import Problem, load_problems
from sglang_optimal.distill.progress import RunProgress
from sglang_optimal.distill.records import Context, NotStored, PartialRecord, Record, stored_fields
from sglang_optimal.distill.server import OwnServer, SharedServer
from sglang_optimal.distill.settings import fingerprint, is_same, refusal, step_configs
from sglang_optimal.distill.shown import MissingValue
from sglang_optimal.distill.store import RecordStore, Tally
from sglang_optimal.distill.token_texts import AnswerProbabilities
from sglang_optimal.names import SERIES
from sglang_optimal.wanted import wanted_by

REFUSALS = 8
"""A run ends when so many problems are refused with one message before any is sampled: the settings are wrong then, not
the data."""
SYNC_EVERY = 1.0
"""Seconds between two times that the disk is told to keep everything."""
LOOK_EVERY = 10.0
"""Seconds between two looks at the servers' models; records name them."""


@dataclasses.dataclass(frozen=True)
class RunResult:
    """folder: of the run. planned: samples of this shard, of an escalation the most that may come. tally: over all its
    records. failed: samples that servers gave up on; the same command tries them again."""

    folder: Path
    planned: int
    tally: Tally
    failed: int

    @property
    def complete(self) -> bool:
        return self.failed == 0


class Plan:
    """What a run is to sample.

    Args:
        config: the run's settings.
        shard: (i, n): every n-th problem, from the i-th on.

    Attributes:
        steps: settings of each step of an escalation; of any other run its own alone.

    Raises:
        ValueError: problems, templates or filters are wrong; every context has been rendered once.
    """

    def __init__(self, config: DistillConfig, shard: tuple[int, int] = (0, 1)):
        self.config, self.shard = config, shard
        self.steps = step_configs(config)
        everything = load_problems(config.data)
        index, count = shard
        self.problems = everything[index::count]
        self.filters = FilterChain(config.filters)
        self.answers = AnswerProbabilities(AnswerField.of(config.filters), config.client.tokenizer)
        self.builder = ContextBuilder(
            config.contexts, list(everything[0].fields), config.data.privileged, config.sampling.seed
        )
        self.left_out: list[str] = []
        self.problems = [problem for problem in self.problems if self._is_whole(problem)]
        if not self.problems and self.left_out:
            raise ValueError(f"data.missing: no problem has every value that the templates show: {self.left_out[0]}")

    def _is_whole(self, problem: Problem) -> bool:
        try:
            self.builder.check(problem)
        except MissingValue as error:
            if self.config.data.missing == "error":
                raise ValueError(f"{error} Mend the data, or set data.missing: skip.") from None
            self.left_out.append(str(error))
            return False
        return True

    def remarks(self) -> list[str]:
        """What a user should know of the problems before they are sampled."""
        remarks = []
        if self.left_out:
            remarks.append(f"{len(self.left_out)} problems left out (data.missing: skip): {self.left_out[0]}")
        mentions = Counter(name for problem in self.problems for name in self.builder.mentions(problem))
        for name, count in mentions.items():
            remarks.append(
                f"the student's prompt of {count} of {len(self.problems)} problems has a short value of {name!r} as a "
                "word in it; look at them with preview whether it gives the answer away."
            )
        return remarks

    @property
    def total(self) -> int:
        """Samples; of an escalation the most that may come."""
        return len(self.problems) * self.builder.per_problem(self.config.sampling.n) * len(self.steps)

    def tasks(self) -> Iterator[Task]:
        """Every sample; of an escalation every one that may come."""
        for problem in self.problems:
            for number in range(1, len(self.steps) + 1):
                step = None if self.config.escalate is None else number
                yield from self.builder.tasks(problem, self.config.sampling.n, step)

    def due(self, done: Collection[str], tally: Tally, failed: Collection[str] = ()) -> Iterator[Task]:
        """The samples to draw now, by what is stored: those of a run that are missing; of an escalation for each
        problem those of its first step that is not whole, if no earlier one has solved it.

        Args:
            done: ids of stored records. tally: over them.
            failed: ids not to be tried again now.
        """
        escalate, n = self.config.escalate, self.config.sampling.n
        for problem in self.problems:
            for number in range(1, len(self.steps) + 1):
                step = None if escalate is None else number
                missing = [task for task in self.builder.tasks(problem, n, step) if task.id not in done]
                yield from (task for task in missing if task.id not in failed)
                if missing or (escalate and tally.accepted_until(problem.id, number) >= escalate.accept):
                    break

    def sampling(self, task: Task) -> dict[str, Any]:
        """SGLang's sampling parameters for one sample."""
        params = self.config.sampling.model_dump(exclude={"n", "seed", "one_model"}, exclude_defaults=True)
        params |= {
            "max_new_tokens": self.config.sampling.max_new_tokens,
            "temperature": self.config.sampling.temperature,
            "sampling_seed": seed_of(self.config.sampling.seed, task.id),
        }
        return params

    def mixing_fields(self, task: Task) -> dict[str, Any]:
        """The mixing fields of one request."""
        step = self.steps[(task.step or 1) - 1]
        fields = step.mixing.request_fields() | self.config.output.request_fields()
        for side in ("teacher", "student"):
            if variables := self.config.contexts.variables_of(side):
                fields[f"{side}_chat_template_kwargs"] = variables
        return fields


def seed_of(base: int, task_id: str) -> int:
    """A 31-bit seed for one sample; the same whenever the run is repeated."""
    return zlib.crc32(f"{base}/{task_id}".encode()) & 0x7FFFFFFF


def run(config: DistillConfig, *, shard: tuple[int, int] = (0, 1), console: Console | None = None) -> RunResult:
    """Sample, filter and store every planned sample that the folder has not got; blocks until done.

    Args:
        config: with ``data.path`` and ``output.dir`` set.
        shard: (i, n): this machine's part of the problems.
        console: for progress; stderr by default.

    Returns:
        RunResult.

    Raises:
        ValueError: the settings or the folder are wrong; nothing was sampled.
        NoServerAvailable: no server answers any more. What is there is kept: run it again.
        OSError: the disk is full or the folder cannot be written; the same.
    """
    return asyncio.run(run_here(config, shard=shard, console=console))


async def run_here(
    config: DistillConfig,
    *,
    shard: tuple[int, int] = (0, 1),
    console: Console | None = None,
    shared: SharedServer | None = None,
) -> RunResult:
    """As `run`, within an event loop.

    Args:
        shared: the server of several runs, where there are no endpoints.
    """
    check_settings(config)
    plan = Plan(config, shard)
    folder = Path(config.output.dir or "")
    store = RecordStore(
        folder, shard, format=config.output.format, shard_records=config.output.shard_records,
        series=bool(config.output.series),
    )  # fmt: skip
    try:
        return await _Run(plan, store, console or Console(stderr=True), shared).run()
    finally:
        store.close()


def check_settings(config: DistillConfig) -> None:
    """Raises ValueError: a run cannot be made of these settings, whatever its data and servers are."""
    if config.output.dir is None:
        raise ValueError("output.dir: is required (or give --out).")
    if config.select is not None:
        raise ValueError(
            "select: is not read by `run`, which has not got all samples of a problem while it goes on; leave it out, "
            "and give it to `distill filter RUN` when the run is done."
        )
    for step in step_configs(config):
        _planned(config, step)  # raises where it asks for what cannot be
    if not config.client.endpoints and not config.server.get("model_path"):
        raise ValueError(
            "client.endpoints, server.model_path: give the servers to ask (or --endpoint), or the model of a server "
            "that the run starts itself."
        )


def _planned(config: DistillConfig, step: DistillConfig) -> tuple[str | None, str | None]:
    """As `planned`; a mixture that is a step of many runs both models, whatever ``one_model`` asks of the others."""
    return (None, None) if config.escalate is not None and side_of(step) is None else planned(step)


class _Run:
    """One process's part of a run."""

    def __init__(self, plan: Plan, store: RecordStore, console: Console, shared: SharedServer | None = None):
        self._plan, self._store, self._console, self._shared = plan, store, console, shared
        self._config = plan.config
        self._manifest = self._resumed_manifest()
        # Beside the event loop, which other requests wait for; one thread, since filters may have a memory.
        self._judge = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="filters")
        self._sampled = 0
        self._held: list[Record] = []
        self._refused: dict[str, set[str]] = {}  # message: problems
        self._carded = 0  # shards that the card knows of
        self._sampling_since: float | None = None
        self._alone: str | None = None  # the side that a whole run asks, and none beside it
        self._sides: list[str | None] = []  # of each step, the side that runs alone
        self._failed: set[str] = set()
        self._elapsed_before = float(self._manifest.get("elapsed_seconds", 0.0))

    def _resumed_manifest(self) -> dict[str, Any]:
        path = self._store.manifest_path
        ours = fingerprint(self._config)
        if not self._store.done:  # a start that came to nothing binds nobody
            return {"run_id": uuid.uuid4().hex, "fingerprint": ours, "started": _now()}
        if not path.exists():
            raise ValueError(f"{self._store.folder}: has records but no {path.name}; give another --out.")
        manifest = json.loads(path.read_text())
        if manifest.get("sources"):
            raise ValueError(
                f"{self._store.folder}: holds runs of different settings that were merged, and no plan to go on with; "
                "give another --out, and merge again."
            )
        if (manifest.get("config") or {}).get("select"):
            raise ValueError(
                f"{self._store.folder}: holds what `distill filter` selected (select); go on in the run that it was "
                "made of, and filter that again, or give another --out."
            )
        if not is_same(manifest, self._config):
            raise ValueError(f"{self._store.folder}: {refusal(manifest, self._config)}")
        return manifest | {"fingerprint": ours}

    async def run(self) -> RunResult:
        store, plan = self._store, self._plan
        if plan.filters.has_memory:
            plan.filters.remember(store.accepted_texts())
        missing = list(plan.due(store.done, store.tally))
        self._save("running")
        if store.done:
            self._check_same_problems()
            self._say(f"resuming {store.folder}: {len(store.done)} samples are there.")
        for remark in plan.remarks() if missing else ():
            self._say(remark)
        if missing:
            self._renew_card()  # before the first record: without a card load_dataset would take all that it finds
            try:
                async with self._servers() as servers:
                    await self._sample_all(servers, missing)
            finally:
                with contextlib.suppress(OSError):  # the error that ended the run says more
                    # What is there can be read by load_dataset, however the run ended.
                    store.finalize()
                    self._save("stopped")
                    write_card(store.folder)
        self._store.finalize()
        self._save("complete" if not self._failed else "stopped")
        write_card(store.folder)
        return RunResult(store.folder, plan.total, store.tally, len(self._failed))

    def _check_same_problems(self) -> None:
        """Raises ValueError: a problem has other fields than when it was sampled, under the same id."""
        now = {problem.id: stored_fields(problem.fields) for problem in self._plan.problems}
        gone = 0
        for problem_id, fields in self._store.sampled_fields():
            if problem_id not in now:
                gone += 1
            elif now[problem_id] != fields:
                raise ValueError(
                    f"data.path: problem {problem_id!r} is not what it was when it was sampled; give another --out, or "
                    "the data as they were."
                )
        if gone:
            self._say(f"{gone} samples are of problems that are not among these any more; they stay in the run.")

    @contextlib.asynccontextmanager
    async def _servers(self) -> AsyncIterator[Servers]:
        config = self._config
        whys = self._models_to_run()
        self._alone = self._sides[0] if len(self._sides) == 1 else None
        async with contextlib.AsyncExitStack() as stack:
            endpoints: Sequence[str] = config.client.endpoints
            api_key = None
            if not endpoints and self._shared is not None:
                endpoints, api_key = [await self._shared.url()], config.server.get("api_key")
            elif not endpoints:
                self._say(f"starting a server; its log: {self._store.folder / 'server.log'}")
                mixing, server = config.mixing.given(), config.server
                if self._alone is not None:
                    mixing, server = own_server(config, self._alone)
                own = OwnServer(mixing, server, self._store.folder / "server.log")
                await stack.enter_async_context(own)
                endpoints, api_key = [own.url], config.server.get("api_key")
            servers = await stack.enter_async_context(
                Servers(endpoints, config.client, api_key=api_key, alone=self._alone)
            )
            await servers.check()
            for i, why in enumerate(whys):
                self._settle_model(servers, i, why)
            ran = [side or "both" for side in self._sides]
            # Of an escalation: what each of its records says of a step, and this of all together.
            self._manifest["models_run"] = ran[0] if len(set(ran)) == 1 else "both"
            if self._config.escalate is not None:
                self._manifest["steps_run"] = ran
            self._save("running")
            await asyncio.to_thread(self._find_tokenizer, servers)
            yield servers

    def _find_tokenizer(self, servers: Servers) -> None:
        """Raises ValueError: a filter needs one, and there is none."""
        self._plan.answers.require(servers.model_names(), self._config.filters, "servers")

    def _models_to_run(self) -> list[str | None]:
        """Settle for each step which side is to run alone, if its servers can; None: both run.

        Returns:
            Why both run where one would do, of each step; None where there is nothing to say.

        Raises:
            ValueError: filters need what it does not say; or the settings ask for what cannot be.
        """
        begun = self._begun()
        whys: list[str | None] = []
        for i, step in enumerate(self._plan.steps):
            side, why = _planned(self._config, step)
            if i < len(begun):  # what a record is stays as it was
                side, why = (None, None) if begun[i] == "both" else (begun[i], None)
            if side is not None and not self._config.client.endpoints:
                check_filters(self._config, side)  # before a server is started
            self._sides.append(side)
            whys.append(why)
        return whys

    def _begun(self) -> list[str]:
        """What runs at each step of a run that has begun: a side, or ``both``."""
        if self._config.escalate is not None:
            return self._manifest.get("steps_run", [])
        ran = self._manifest.get("models_run", "both" if self._store.done else None)
        return [] if ran is None else [ran]

    def _settle_model(self, servers: Servers, i: int, why: str | None) -> None:
        """Decide whether one model runs alone at a step, now that it is known what the servers serve.

        Args:
            why: both run, where one would do.

        Raises:
            ValueError: they cannot serve it alone, and the run has begun so or asks for it; or filters need what it
                does not say.
        """
        side, at = self._sides[i], "" if self._config.escalate is None else f"step {i + 1}: "
        if why is not None:
            self._say(f"{at}both models run: {why}.")
        if side is not None and (urls := servers.not_serving_alone(side)):
            begun = self._begun()[i : i + 1] == [side]
            what = f"{urls[0]}: its plain requests are not answered by the {side}"
            if begun or self._config.sampling.one_model == "always":
                because = "as the run has begun" if begun else "as sampling.one_model: always asks"
                raise ValueError(
                    f"{at}{what}, so that it cannot run alone, {because}; start one with --model-path of the {side} "
                    f"and {self._flag(side)}{self._or_own(', or leave client.endpoints out, so that the run does')}."
                )
            if self._alone is not None:
                servers.ask_both()
                self._alone = None
            self._sides[i] = None
            own = self._or_own(" (or the run's own server)")
            self._say(
                f"{at}both models run: {what}. One with --model-path of the {side} and {self._flag(side)}{own} halves "
                "the forward passes."
            )
        elif side is not None:
            check_filters(self._config, side)
            servers.ask_alone(side)
            for url in servers.without_student():
                self._say(f"{url}: serves {servers.models(url)[f'{side}_model']} alone, which is taken for the {side}.")
            self._say(
                f"{at}the {side} alone runs, one forward pass a token: {', '.join(MISSING[side])} are not known "
                "(sampling.one_model: never for both models)."
            )

    def _flag(self, side: str) -> str:
        """Of a server whose plain requests this side answers."""
        if self._config.escalate is None:
            return "--student-weights none"
        return "--teacher-model-path" if side == "student" else "--student-model-path"

    def _or_own(self, text: str) -> str:
        """The run's own server serves one model alone where the whole run asks for it."""
        return text if self._config.escalate is None else ""

    async def _sample_all(self, servers: Servers, tasks: list[Task]) -> None:
        """Draw these samples, and of an escalation, when all of them are there, those that are due then."""
        plan, store = self._plan, self._store
        self._sampling_since = time.monotonic()
        progress = RunProgress(plan.total, store.tally, self._console, at_most=len(plan.steps) > 1)

        async def work(queue: Iterator[Task]) -> None:
            for task in queue:
                try:
                    self._keep(await self._sampled_record(servers, task))
                except RetriesExhausted as error:
                    self._failed.add(task.id)
                    progress.failed = len(self._failed)
                    self._say(f"failed: {task.id}: {error}")

        async def keep() -> None:
            while True:
                await asyncio.sleep(SYNC_EVERY)
                progress.update()
                await asyncio.to_thread(self._store.sync)
                if self._store.sealed != self._carded:
                    await asyncio.to_thread(self._renew_card)

        async def look() -> None:
            while True:
                await asyncio.sleep(LOOK_EVERY)
                await servers.refresh()

        with progress:
            try:
                async with asyncio.TaskGroup() as group:
                    helpers = [group.create_task(keep()), group.create_task(look())]
                    while tasks:
                        queue = iter(tasks)
                        async with asyncio.TaskGroup() as workers:
                            for _ in range(min(self._config.client.concurrency, len(tasks))):
                                workers.create_task(work(queue))
                        self._keep_held()
                        tasks = list(plan.due(store.done, store.tally, self._failed))
                    for helper in helpers:
                        helper.cancel()
            except BaseExceptionGroup as errors:
                raise _first(errors) from None
            finally:
                self._judge.shutdown(wait=False, cancel_futures=True)
                await asyncio.to_thread(self._store.sync)

    def _renew_card(self) -> None:
        self._carded = self._store.sealed
        with contextlib.suppress(OSError, ValueError):  # another machine's hand in it; it is written again at the end
            renew_card(self._store.folder)

    def _keep(self, record: Record) -> None:
        # Refusals before the first sample may be the server's fault, of which the run would end: the same command must
        # ask for them again then.
        if self._sampled == 0:
            self._held.append(record)
            return
        self._keep_held()
        self._store.append(record)

    def _keep_held(self) -> None:
        while self._held:
            self._store.append(self._held.pop(0))

    async def _sampled_record(self, servers: Servers, task: Task) -> Record:
        teacher, student = self._plan.builder.render(task)
        sampling, fields = self._plan.sampling(task), self._plan.mixing_fields(task)
        side = self._sides[(task.step or 1) - 1]
        asked_for = {**sampling, **fields} if side is None else asked(sampling, side)
        try:
            if side is None:
                sample = await servers.generate(teacher, student, sampling, fields)
            else:
                kwargs = fields.get(f"{side}_chat_template_kwargs")
                context = student if side == "student" else teacher
                sample = await servers.generate_alone(side, context, sampling, kwargs)
        except BadRequestError as error:
            problems = self._refused.setdefault(str(error), set())
            problems.add(task.problem.id)
            if self._sampled == 0 and len(problems) >= min(REFUSALS, len(self._plan.problems)):
                raise ValueError(f"the server refuses every request: {error}") from None
            return _refusal(task, teacher, student, asked_for, str(error))
        self._sampled += 1
        if sample.student_prompt_text is not None:
            self._plan.builder.check_read(task.problem, sample.student_prompt_text)
        models = {**servers.models(sample.endpoint, side), f"{side or 'teacher'}_weight_version": sample.weight_version}
        record = _record(task, teacher, student, asked_for, sample, models)
        try:
            rejection = await asyncio.get_running_loop().run_in_executor(self._judge, self._judged, record)
        except NotStored as error:
            raise needs(f"filters: {error.filter}", error.name, side or "mixture") from None
        if rejection is not None:
            record.accepted, record.rejected_by, record.reject_reason = False, rejection.filter, rejection.reason
        return record

    def _judged(self, record: Record) -> Rejection | None:
        self._plan.answers(record)
        return self._plan.filters(record)

    def _sampling_seconds(self) -> float:
        return time.monotonic() - self._sampling_since if self._sampling_since is not None else 0.0

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _save(self, state: str) -> None:
        tally = self._store.tally
        self._manifest |= {
            "state": state,
            "finished": _now() if state == "complete" else None,
            "elapsed_seconds": round(self._elapsed_before + self._sampling_seconds(), 1),
            "shard": "{}/{}".format(*self._plan.shard),
            "planned": self._plan.total,
            "failed": len(self._failed),
            **tally.counts(),
            "filters": [f.label for f in self._config.filters],
            "versions": {"sglang_optimal": __version__},
            "config": self._config.model_dump(mode="json", exclude={"server": {"api_key", "admin_api_key"}}),
        }
        self._store.write_json(self._store.manifest_path, self._manifest)


def _record(
    task: Task,
    teacher: Context,
    student: Context,
    asked: dict[str, Any],
    sample: Sample,
    models: dict[str, str | None],
) -> Record:
    series: dict[str, Any] = {name: sample.series[name] for name in SERIES if name in sample.series}
    side: str | None = asked.get(ALONE)
    record = (Record if side is None else PartialRecord)(
        id=task.id,
        problem_id=task.problem.id,
        strategy=task.strategy,
        sample_index=task.sample_index,
        step=task.step,
        fields=task.problem.fields,
        teacher_context=teacher,
        student_context=student,
        text=sample.text,
        token_ids=sample.token_ids,
        finish_reason=sample.finish_reason,
        **series,
        more_series={name: values for name, values in sample.series.items() if name not in series},
        top_k=sample.top_k,
        sampling=asked,
        seed=asked["sampling_seed"],
        teacher_prompt_tokens=sample.prompt_tokens,
        teacher_prompt_ids=sample.teacher_prompt_ids,
        student_prompt_ids=sample.student_prompt_ids,
        latency=sample.latency,
        models=models,
    )
    if isinstance(record, PartialRecord) and side is not None:
        record.missing = MISSING[side]
    return record


def _refusal(task: Task, teacher: Context, student: Context, asked: dict[str, Any], message: str) -> Record:
    wanted = wanted_by(asked)
    empty: dict[str, list[float]] = {name: [] for name in wanted.series}
    nothing = Sample("", [], "refused", empty, 0, 0.0, "", None, top_k={side: {} for side in wanted.sides})
    record = _record(task, teacher, student, asked, nothing, {"sglang_optimal_version": __version__})
    record.accepted, record.rejected_by, record.reject_reason = False, "server", message
    return record


def _first(errors: BaseExceptionGroup) -> BaseException:
    """The error to show of a group: what ended the run, not the cancellations that followed."""
    flat: list[BaseException] = []
    stack: list[BaseException] = [errors]
    while stack:
        error = stack.pop()
        if isinstance(error, BaseExceptionGroup):
            stack += error.exceptions
        else:
            flat.append(error)
    return next((e for e in flat if isinstance(e, ValueError | NoServerAvailable | OSError)), flat[0])


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")

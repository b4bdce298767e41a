"""`distill probe`: few problems at several settings of α, each an ordinary run, and which of them to take.

Every setting samples the same problems, with the same contexts and the same draw of strategies.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from sglang_optimal.config import ALPHA_KEYS
from sglang_optimal.distill.compare import compare
from sglang_optimal.distill.config import DistillConfig, parse_config
from sglang_optimal.distill.escalation import mixing_of_step
from sglang_optimal.distill.one_model import check_filters, side_of
from sglang_optimal.distill.pipeline import Plan, RunResult, check_settings, run_here
from sglang_optimal.distill.probe_advice import MIXTURE, Figures, recommended
from sglang_optimal.distill.probe_settings import DEFAULT, ENDS, settings_of
from sglang_optimal.distill.server import SharedServer


@dataclasses.dataclass(frozen=True)
class Arm:
    """One setting.

    Attributes:
        name: of its folder and in the table: the setting as it was given, and ``@strategy``.
        kind: ``student``, ``teacher`` (of which no other model is needed) or ``mixture``.
        config: of its run.
    """

    name: str
    kind: str
    config: DistillConfig


def arms_of(
    config: DistillConfig, out: Path, *, settings: str = DEFAULT, strategies: bool = False, problems: int = 50
) -> list[Arm]:
    """The runs of a probe.

    Args:
        config: of the file, with ``sampling.n`` as the probe has it.
        out: folder of the probe.
        strategies: each strategy of the file by itself, as with ``contexts.select: cross``. The student alone reads
            one context, and is there once, unless strategies have a ``student`` template of their own.

    Raises:
        ValueError: what no run can be made of; nothing was started.
    """
    if problems < 1:
        raise ValueError(f"--problems: must be positive, got {problems}.")
    if any(out.glob("run*.json")):
        raise ValueError(f"--out: {out} is a run; give a folder for the runs of the probe.")
    one_by_one = (strategies or config.contexts.select == "cross") and len(config.contexts.strategies) > 1
    alike = all(strategy.student is None for strategy in config.contexts.strategies)
    arms: list[Arm] = []
    for name, alpha in settings_of(settings).items():
        chosen = list(config.contexts.strategies) if one_by_one else [None]
        if alpha == ENDS["student"] and alike:
            chosen = chosen[:1]
        for strategy in chosen:
            contexts = config.contexts
            of_one = strategy is not None and not (alpha == ENDS["student"] and alike)
            called = f"{name}@{strategy.name}" if strategy is not None and of_one else name
            if strategy is not None:
                contexts = contexts.model_copy(update={"strategies": [strategy], "select": "sample"})
            arms.append(_arm(config, out / called, called, alpha, contexts, problems))
    if len(arms) < 2:
        raise ValueError(f"--settings: {settings!r} is one setting; give two or more.")
    for arm in arms:
        check_settings(arm.config)
    limit = config.data.model_copy(update={"limit": min(problems, config.data.limit or problems)})
    Plan(config.model_copy(update={"data": limit}))  # data, all templates and filters
    return arms


def _arm(config: DistillConfig, folder: Path, name: str, alpha: dict[str, Any], contexts: Any, problems: int) -> Arm:
    values = config.model_dump()
    try:
        values["mixing"] = mixing_of_step(config.mixing.given(), parse_step(alpha))
        values |= {"escalate": None, "contexts": contexts.model_dump()}
        values["data"]["limit"] = min(problems, config.data.limit or problems)
        values["output"]["dir"] = str(folder)
        made = parse_config(values, "config")
    except ValueError as error:
        raise ValueError(f"--settings: {name!r}: {str(error).removeprefix('config: ')}") from None
    side = side_of(made)
    # What a probe compares needs the student's log-probabilities, of the teacher's text too.
    one_model = config.sampling.one_model if side == "student" else "auto"
    if side == "student" and one_model == "auto":
        try:
            check_filters(made, "student")
        except ValueError:
            one_model = "never"
    made = made.model_copy(update={"sampling": made.sampling.model_copy(update={"one_model": one_model})})
    return Arm(name, side or MIXTURE, made)


def parse_step(alpha: dict[str, Any]) -> Any:
    """Alpha keys as a step of an escalation. Raises ValueError: with the key and what is wrong."""
    other = {"fixed_alpha": 0.0}
    contexts = {"student": "-", "strategies": [{"teacher": "-"}]}
    try:
        made = parse_config({"contexts": contexts, "escalate": {"steps": [alpha, other]}}, "config")
    except ValueError as error:
        raise ValueError(str(error).removeprefix("config: escalate.steps[0]").lstrip(".: ")) from None
    assert made.escalate is not None
    return made.escalate.steps[0]


async def run_arms(arms: Sequence[Arm], out: Path, console: Console) -> list[RunResult]:
    """Run what is missing of each, one after the other, against the endpoints or one server that is started once.

    Raises:
        ValueError, NoServerAvailable, OSError: as `sglang_optimal.distill.run`.
    """
    config = arms[0].config
    results = []
    async with contextlib.AsyncExitStack() as stack:
        shared = None
        if not config.client.endpoints:
            # The alpha keys are those of requests.
            mixing = {name: value for name, value in config.mixing.given().items() if name not in ALPHA_KEYS}
            shared = await stack.enter_async_context(SharedServer(mixing, config.server, out / "server.log"))
        for number, arm in enumerate(arms, 1):
            console.print(f"{number} of {len(arms)}: {arm.name}", markup=False, highlight=False, soft_wrap=True)
            results.append(await run_here(arm.config, console=console, shared=shared))
    return results


def assessed(arms: Sequence[Arm], *, seed: int = 0) -> dict[str, Any]:
    """Compare the runs of a probe, and recommend one.

    Args:
        seed: of the bootstrap.

    Returns:
        What the table shows and probe.json has: ``problems`` (that all have sampled), ``samples`` (of a problem),
        ``arms`` in their order (see `Figures`), ``recommendation`` and the whole ``comparison``.

    Raises:
        ValueError: as `sglang_optimal.distill.compare.compare`.
    """
    result = compare([Path(str(arm.config.output.dir)) for arm in arms], seed=seed, texts=True)
    level = result["levels"]["all"]
    filtered = any(f.type == "equations" for f in arms[0].config.filters)
    figures = []
    for arm in arms:
        run = level["runs"][arm.name]
        needed = run["tokens"] * (2 if arm.kind == MIXTURE else 1)
        sound = run["accepted"] if filtered else run["sound"] if run["with_equations"] else None
        figures.append(
            Figures(
                name=arm.name,
                kind=arm.kind,
                problems=result["problems"]["common"],
                covered=run["covered"],
                covered_share=run["covered_share"],
                accepted_of_samples=run["accepted_of_samples"],
                samples=run["samples"],
                accepted=run["accepted"],
                sound=sound,
                with_equations=None if filtered else run["with_equations"],
                surprising=run["surprising"],
                student_logprob=run["student_logprob"],
                student_logprob_interval=run["student_logprob_interval"],
                kl_to_student=run["kl_to_student"],
                passes=needed,
                passes_taken=run["passes"],
                passes_per_accepted=needed / run["accepted"] if run["accepted"] else None,
            )
        )
    return {
        "problems": result["problems"]["common"],
        "samples": arms[0].config.sampling.n,
        "sound_by": "filter" if filtered else "text",
        "arms": [dataclasses.asdict(one) for one in figures],
        "recommendation": dataclasses.asdict(recommended(figures, level["differences"])),
        "comparison": result,
    }

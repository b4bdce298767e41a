"""Runs whose text is one model's alone: at ``fixed_alpha`` 0 the student's, at 1 the teacher's.

Where the other model need not run, it does not: requests are plain ones, to a server that serves the model, and a token
costs one forward pass. The series that only the other model could say are not there then (`MISSING`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang_optimal.config import OWN_TEMPLATE, override
from sglang_optimal.distill.filters import first_unmet
from sglang_optimal.distill.passes import ALONE
from sglang_optimal.distill.records import PartialRecord
from sglang_optimal.names import OTHER_MODEL

if TYPE_CHECKING:
    from sglang_optimal.distill.config import DistillConfig

MISSING = {
    "student": ("teacher_logprob", "kl_to_teacher", "ess_ratio"),
    "teacher": ("student_logprob", "kl_to_student", "ess_ratio"),
}
"""Series that are not there where a side runs alone. The others are exact: α is 0 or 1, the mixture is the model, and
KL to it is 0."""


def side_of(config: DistillConfig) -> str | None:
    """Whose text it is by its α: ``student``, ``teacher``, or None for a mixture."""
    settings = override({}, config.mixing.given())
    alpha = settings.get("fixed_alpha")
    if settings.get("alpha_method") != "fixed" or alpha not in (0, 1):
        return None
    return "teacher" if alpha else "student"


def planned(config: DistillConfig) -> tuple[str | None, str | None]:
    """Which model is to run alone, as far as the settings say.

    Returns:
        (``student``, ``teacher``, or None where both run; why both run where one would do).

    Raises:
        ValueError: ``sampling.one_model: always`` where both must run.
    """
    side, setting = side_of(config), config.sampling.one_model
    if setting == "never" or (side is None and setting == "auto"):
        return None, None
    if side is None:
        raise ValueError(
            "sampling.one_model: 'always' needs mixing.fixed_alpha: 0 (the student alone) or 1 (the teacher alone)."
        )
    why = _why_both(config, side)
    if why is None:
        return side, None
    if setting == "always":
        raise ValueError(f"sampling.one_model: 'always', but {why}.")
    return None, why


def _why_both(config: DistillConfig, side: str) -> str | None:
    other = OTHER_MODEL[side]
    if isinstance(config.output.series, list):
        return f"output.series asks for {config.output.series[0]}, which takes both models"
    if config.output.return_top_k:
        return "output.return_top_k takes both models"
    if side == "teacher" and config.sampling.one_model == "auto":
        return f"the {other} reads along, for its log-probabilities (sampling.one_model: always for the {side} alone)"
    if not config.client.endpoints and side == "student" and config.mixing.given().get("student_lora_path") is not None:
        return "mixing.student_lora_path: the run's own server has the adapter beside the teacher alone"
    return None


def check_filters(config: DistillConfig, side: str) -> None:
    """Refuse filters that need what ``side`` alone does not say. Those that users wrote are asked in their turn.

    Raises:
        ValueError: names the filter.
    """
    record = PartialRecord(
        id="", problem_id="", strategy="", sample_index=0, fields={}, teacher_context="", student_context="", text="",
        token_ids=[0], finish_reason="stop", alpha=[0.0], teacher_logprob=[0.0], student_logprob=[0.0],
        mixture_logprob=[0.0], kl_to_student=[0.0], kl_to_teacher=[0.0], ess_ratio=[1.0],
    )  # fmt: skip
    record.missing = MISSING[side]
    if found := first_unmet(config.filters, record):
        i, what = found
        raise needs(f"filters[{i}] ({config.filters[i].label})", what.name, side)


def needs(place: str, name: str, side: str) -> ValueError:
    return ValueError(
        f"{place}: needs {name} of every token, which the {side} alone does not say; leave the filter out, or set "
        "sampling.one_model: never to have both models run."
    )


def own_server(config: DistillConfig, side: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The sections ``mixing`` and ``server`` of a server that serves ``side`` alone."""
    mixing, server = config.mixing.given(), dict(config.server)
    path, revision = mixing.get(f"{side}_model_path"), mixing.get(f"{side}_revision")
    if path is not None:  # what server says of a model is of the other
        server |= {"model_path": path, "revision": revision}
        for name in ("revision", "tokenizer_path"):
            if name == "tokenizer_path" or revision is None:
                server.pop(name, None)
    template = mixing.get(f"{side}_chat_template")
    if template == OWN_TEMPLATE:
        server.pop("chat_template", None)
    elif template is not None:
        server["chat_template"] = template
    return {"student_weights": "none"}, server


def is_served(models: dict[str, Any], side: str) -> bool:
    """Whether a plain request to a server is answered by ``side``.

    Args:
        models: what `sglang_optimal.distill.client` knows of the server.
    """
    return side in models.get("serves", ())


def asked(sampling: dict[str, Any], side: str) -> dict[str, Any]:
    """What a record says was asked for."""
    return {**sampling, "alpha_method": "fixed", "fixed_alpha": 0.0 if side == "student" else 1.0, ALONE: side}


def series_of(side: str, logprobs: list[float]) -> dict[str, list[float]]:
    """The series of a sample that ``side`` drew alone, of its log-probabilities."""
    zeros, alpha = [0.0] * len(logprobs), 0.0 if side == "student" else 1.0
    return {
        "alpha": [alpha] * len(logprobs),
        f"{side}_logprob": logprobs,
        "mixture_logprob": list(logprobs),
        f"kl_to_{side}": zeros,
    }

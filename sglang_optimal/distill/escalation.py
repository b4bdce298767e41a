"""Escalation: step after step with another α, for the problems alone that are not solved yet.

The state of a run is what it has stored: how many samples of a problem each step has, and how many were accepted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, create_model, model_validator

from sglang_optimal.config import ALPHA_KEYS, SETTINGS, AlphaSettings, override
from sglang_optimal.distill.section import Section, optional_key

if TYPE_CHECKING:
    from sglang_optimal.distill.store import Tally


class _Step(Section):
    """The alpha keys of ``mixing`` for one step, over those of the section ``mixing``."""

    @model_validator(mode="after")
    def _consistent(self) -> _Step:
        if not self.given():
            raise ValueError(f"a step needs one of {', '.join(ALPHA_KEYS)}.")
        AlphaSettings().updated(self.given())
        return self

    @property
    def words(self) -> str:
        """Such as ``kl_budget 0.1``."""
        return words(self.given())


if TYPE_CHECKING:

    class Step(_Step):
        """What a type checker sees."""

else:
    Step = create_model(
        "Step",
        __base__=_Step,
        __doc__=_Step.__doc__,
        __module__=__name__,
        **{name: optional_key(SETTINGS[name]) for name in ALPHA_KEYS},
    )


def words(alpha: dict[str, Any]) -> str:
    """Alpha keys for a table: ``kl_budget 0.1``, ``kl_symmetry, alpha_max 0.3``."""
    parts = [str(alpha["alpha_method"])] if "alpha_method" in alpha else []
    return ", ".join([*parts, *(f"{name} {alpha[name]:g}" for name in ALPHA_KEYS[1:] if name in alpha)])


class Escalate(Section):
    """Steps that are taken one after the other, each with ``sampling.n`` samples of the problems that are not solved
    yet."""

    steps: Annotated[list[Step], Field(min_length=2)]
    """In their order; each has alpha keys of ``mixing``, over those of the section ``mixing``."""
    accept: Annotated[int, Field(gt=0)] = 1
    """A problem is solved, and takes no further step, when so many of its samples are accepted."""


def mixing_of_step(mixing: dict[str, Any], step: Step) -> dict[str, Any]:
    """The values of the section ``mixing`` at a step.

    Raises:
        ValueError: a bound that the method of this step does not read.
    """
    given = step.given()
    values = override(override({}, mixing), given)
    if values.get("alpha_method") == "fixed":
        for name in ("alpha_min", "alpha_max"):
            if name in given:
                raise ValueError(f"{name}: is not read by alpha_method 'fixed', which this step has.")
    return {name: value for name, value in values.items() if value is not None}


def stored_steps(manifests: Sequence[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """The steps in the settings of run.json; of several machines the most. None where they are not known."""
    found = [((m.get("config") or {}).get("escalate") or {}).get("steps") or [] for m in manifests]
    return max(found, key=len, default=[]) or None


def step_rows(tally: Tally, steps: list[dict[str, Any]] | None = None) -> Iterator[dict[str, Any]]:
    """What came of each step that was taken.

    Args:
        tally: over the records.
        steps: see `stored_steps`.

    Yields:
        step (from 1 on), alpha (in words), problems (that took it), samples, accepted, covered_by_then (problems with
        an accepted sample of this step or one before), tokens, passes.
    """
    for number, at in sorted(tally.steps.items()):
        given = steps[number - 1] if steps is not None and number <= len(steps) else {}
        alpha = words({name: value for name, value in given.items() if value is not None})
        yield {
            "step": number,
            "alpha": alpha or "–",
            "problems": len(at.problems),
            "samples": at.samples,
            "accepted": at.accepted,
            "covered_by_then": sum(first <= number for first in tally.first_accepted.values()),
            "tokens": at.tokens,
            "passes": at.passes,
        }

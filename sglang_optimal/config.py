"""Server-level mixing settings, and YAML files that set them. Unknown keys are errors that name the nearest key."""

from __future__ import annotations

import difflib
import inspect
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

F = TypeVar("F", bound=Callable)

ALPHA_METHODS = (
    "kl_symmetry",
    "ess_balance",
    "reverse_kl_symmetry",
    "entropy",
    "fixed",
    "kl_budget",
    "kl_budget_teacher",
)
"""Names in the order of ``sglang_optimal.mixing.AlphaMethod``; kept apart so that parsing needs no torch."""
METHOD_OF_NUMBER = {"fixed_alpha": "fixed", "kl_budget": "kl_budget", "kl_budget_teacher": "kl_budget_teacher"}
"""{setting: the method that needs it, and that it implies}; no other method has one."""
NUMBERLESS_METHODS = tuple(method for method in ALPHA_METHODS if method not in METHOD_OF_NUMBER.values())
"""Those that need nothing but their name."""


def check_known(keys, allowed, where: str) -> None:
    """Raise ValueError for the first key that is not allowed, with the nearest allowed name."""
    for key in keys:
        if key not in allowed:
            near = difflib.get_close_matches(str(key), list(allowed), n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            if not near and len(allowed) <= 30:  # SGLang's hundreds of arguments would bury the message
                hint = f" Known: {', '.join(sorted(allowed))}."
            raise ValueError(f"{where}: unknown key {key!r}.{hint}")


def override(values: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``over`` on top of ``values``; None in ``over`` counts as absent.

    A number of `METHOD_OF_NUMBER` alone means its method; another method drops an older number.
    """
    over = {k: v for k, v in over.items() if v is not None}
    for name, method in METHOD_OF_NUMBER.items():
        if name in over:
            over.setdefault("alpha_method", method)
    if "alpha_method" in over:
        for name, method in METHOD_OF_NUMBER.items():
            if method != over["alpha_method"]:
                over.setdefault(name, None)
    return {**values, **over}


LARGEST_FIXED_ALPHA = 1e6
"""Beyond it a weighted sum of two float32 log-probabilities may be infinite."""
MAX_DRAFT_TOKENS = 32


class Settings(BaseModel):
    """The base of what is declared once, here: flags, YAML, JSON schema and Python arguments are made of its fields,
    whose docstrings are the help. Unknown names and wrong values are a ValueError with the field and the fix."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())

    def __init__(self, **values: Any):
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ValueError(_problem(error.errors()[0])) from None


def _problem(item: Any) -> str:
    """What one of pydantic's errors says is wrong."""
    kind, name, value = item["type"], ".".join(map(str, item["loc"])), item["input"]
    if kind == "value_error":
        message = str(item["ctx"]["error"])
    elif kind == "literal_error":
        allowed = re.findall(r"'([^']*)'", item["ctx"]["expected"])
        near = difflib.get_close_matches(str(value), allowed, n=1)
        message = f"{value!r} is not one of {', '.join(allowed)}.{f' Did you mean {near[0]!r}?' if near else ''}"
    elif kind == "extra_forbidden":
        message = "no such setting."
    else:
        message = f"{item['msg']}; got {value!r}."
    return f"{name}: {message}" if name else message


def _refuse_unless(fits: Callable[[Any], bool], wanted: str) -> BeforeValidator:
    """The check of a value as it was given, in our words."""

    def check(value: Any) -> Any:
        if not fits(value):
            raise ValueError(f"must be {wanted}, got {value!r}.")
        return value

    return BeforeValidator(check)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _on_or_off(value: Any) -> Any:
    """A switch as it was written: YAML makes booleans of on and off."""
    return ("off", "on")[value] if isinstance(value, bool) else value


Text = Annotated[str, _refuse_unless(lambda value: isinstance(value, str) and value != "", "a non-empty string")]
Number = Annotated[float, _refuse_unless(_is_number, "a finite number")]
Nats = Annotated[
    float,
    Field(json_schema_extra={"minimum": 0}),
    _refuse_unless(lambda value: _is_number(value) and value >= 0, "a finite number, 0 or more"),
]
Bound = Annotated[Number, Field(json_schema_extra={"minimum": 0, "maximum": 1})]
Tokens = Annotated[
    int,
    Field(json_schema_extra={"exclusiveMinimum": 0}),
    _refuse_unless(lambda value: _is_integer(value) and value > 0, "a positive integer"),
]
DraftTokens = Annotated[
    int,
    Field(json_schema_extra={"minimum": 0, "maximum": MAX_DRAFT_TOKENS}),
    _refuse_unless(
        lambda value: _is_integer(value) and 0 <= value <= MAX_DRAFT_TOKENS, f"an integer from 0 to {MAX_DRAFT_TOKENS}"
    ),
]
Switch = Annotated[Literal["on", "off"], BeforeValidator(_on_or_off)]


class AlphaSettings(Settings):
    """How alpha is chosen for every token of one request.

    Raises:
        ValueError: unknown method, bounds out of order or range, a method without the number that it needs, or a number
            that the method does not read.
    """

    alpha_method: Literal[ALPHA_METHODS] = "kl_symmetry"  # type: ignore[valid-type]
    """How alpha is solved for each token."""
    alpha_min: Bound = 0.0
    """Lower bound on the solved alpha, in [0, 1]; not used by ``fixed``."""
    alpha_max: Bound = 1.0
    """Upper bound on the solved alpha, in [0, 1]; not used by ``fixed``."""
    fixed_alpha: Number | None = None
    """The teacher's weight for every token; implies ``alpha_method: fixed``. May lie outside [0, 1] (guidance,
    contrastive decoding)."""
    kl_budget: Nats | None = None
    """Largest KL(q‖student) of every token, in nats: the greatest alpha within it; implies ``alpha_method:
    kl_budget``. 0 is the student."""
    kl_budget_teacher: Nats | None = None
    """Largest KL(q‖teacher) of every token, in nats: the least alpha within it; implies ``alpha_method:
    kl_budget_teacher``. 0 is the teacher."""

    @model_validator(mode="after")
    def _consistent(self) -> AlphaSettings:
        if self.fixed_alpha is not None and abs(self.fixed_alpha) > LARGEST_FIXED_ALPHA:
            raise ValueError(
                f"fixed_alpha: must lie in [-{LARGEST_FIXED_ALPHA:.0f}, {LARGEST_FIXED_ALPHA:.0f}], "
                f"got {self.fixed_alpha!r}."
            )
        if not 0.0 <= self.alpha_min <= 1.0 or not 0.0 <= self.alpha_max <= 1.0:
            raise ValueError(
                f"alpha_min, alpha_max: must lie in [0, 1], got {self.alpha_min} and {self.alpha_max}; "
                "use fixed_alpha for a weight outside [0, 1]."
            )
        if self.alpha_min > self.alpha_max:
            raise ValueError(f"alpha_min: {self.alpha_min} is greater than alpha_max {self.alpha_max}.")
        given = [name for name in METHOD_OF_NUMBER if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{', '.join(given)}: give only one of them; each has an alpha_method of its own.")
        for name, method in METHOD_OF_NUMBER.items():
            if self.alpha_method == method and name not in given:
                raise ValueError(f"{name}: required when alpha_method is {method!r}.")
            if self.alpha_method != method and name in given:
                raise ValueError(f"{name}: only read when alpha_method is {method!r}, not {self.alpha_method!r}.")
        return self

    @property
    def budget(self) -> float | None:
        """The budget in nats of either method that has one."""
        return self.kl_budget_teacher if self.kl_budget is None else self.kl_budget

    def updated(self, values: dict[str, Any]) -> AlphaSettings:
        """A copy with ``values`` on top, as `override` does it."""
        return AlphaSettings(**override(self.model_dump(), values))


class MixingConfig(Settings):
    """What a server knows about mixing, beside SGLang's own ServerArgs.

    Attributes:
        alpha: defaults for requests that do not say.
        shared_weights: what ``student_weights`` came to, see `resolved`.
        tokens_of_one: {id: (side, token)} of those that the other side's tokenizer lacks, of a checked configuration.

    Raises:
        ValueError: names the field and the fix.
    """

    student_model_path: Text | None = None
    """Hugging Face id or folder of the student model; by default the teacher itself."""
    student_revision: Text | None = None
    """Revision of the student model on the hub."""
    teacher_model_path: Text | None = None
    """Hugging Face id or folder of the teacher, where the served model (``--model-path``) is the student, as in a
    trainer's own engine. The other way round leave it out and name the student."""
    teacher_revision: Text | None = None
    """Revision of that teacher on the hub."""
    teacher_max_total_tokens: Tokens | None = None
    """Upper bound on that teacher's KV pool, in tokens; by default as many as the served model's."""
    student_max_total_tokens: Tokens | None = None
    """Upper bound on the student's KV pool, in tokens; by default as many as the teacher's."""
    student_chat_template: Text | None = None
    """Chat template of the student's alone: a name of SGLang's, a .jinja or .json file, or ``own`` for that of its own
    tokenizer. By default SGLang's ``--chat-template`` is both models', and without that each has its own."""
    teacher_chat_template: Text | None = None
    """The same for that teacher, where the served model is the student."""
    student_weights: Literal["auto", "shared", "separate", "none"] = "auto"
    """``shared``: the student is the teacher, whose weights are loaded once; both contexts are rows of one forward and
    share one KV pool and radix cache. ``separate``: weights and KV of its own, which can be updated. ``auto``: shared
    when both paths are the same. ``none``: no student; SGLang's own server."""
    student_lora_path: Text | None = None
    """A LoRA adapter of the teacher (Hugging Face id or folder in peft's format) that makes it the student; needs
    shared weights. The student's rows run with it, in the same forward."""
    plain_requests: Literal["allow", "refuse"] = "allow"
    """``refuse`` requests without a student context: something on the way may have dropped it (sglang-router drops
    ``custom_params``), and the teacher alone is not what was asked for."""
    policy: Literal["student", "teacher", "both"] | None = None
    """Which side a trainer's updates of weights are for: what SGLang's routes and calls that load, read or check
    weights act on. By default the student where it has weights of its own, else the one model (``both``); a student
    that is an adapter takes no updates of whole weights."""
    pickled_weights: Literal["allow", "refuse"] = "refuse"
    """``allow`` updates of weights over HTTP in SGLang's own format, which is unpickled (by its unpickler that knows
    tensors alone); they can always be sent as safetensors. A program's own calls are not concerned."""
    weight_rollback: Switch = "on"
    """Whether the old weights are kept on the host during an update, and put back where it fails. ``off``: nothing is
    kept; after an update that fails half way nothing is answered until a whole one has come."""
    mixing_mode: Literal["lockstep", "speculative", "auto"] = "lockstep"
    """``lockstep``: one token a step; ``speculative``: the student drafts ``draft_tokens`` tokens which the teacher
    verifies in one forward, without any change to what is sampled; ``auto``: as many drafts as pay, up to
    ``draft_tokens``, or none. Drafting needs a student with weights of its own."""
    draft_tokens: DraftTokens | None = None
    """Tokens that the student drafts for one step, or at most (``auto``)."""
    mixing_self_check: Switch | None = None
    """Whether to compare, before any request is served, both sides' logits with those of each model alone, and not to
    start where they differ; by default on wherever there is an accelerator."""
    alpha: AlphaSettings = AlphaSettings()
    shared_weights: bool = False
    tokens_of_one: dict[int, tuple[str, str]] = {}

    DRAFT_TOKENS: ClassVar = {"lockstep": 0, "speculative": 4, "auto": 8}
    """``draft_tokens`` where it is not given."""

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "mixing") -> MixingConfig:
        """Build from the flat keys `SETTINGS`; None values count as absent."""
        check_known(values, SETTINGS, where)
        given = {name: value for name, value in values.items() if value is not None}
        own = {name: value for name, value in given.items() if name not in ALPHA_KEYS}
        config = cls(**own)
        alpha = AlphaSettings().updated({name: value for name, value in given.items() if name in ALPHA_KEYS})
        return config.model_copy(update={"alpha": alpha})

    @model_validator(mode="after")
    def _consistent(self) -> MixingConfig:
        kind = self.student_weights
        if self.draft_tokens is not None and self.mixing_mode == "lockstep":
            raise ValueError("draft_tokens: needs mixing_mode 'speculative' or 'auto'; lockstep drafts nothing.")
        if self.plain_requests == "refuse" and kind == "none":
            raise ValueError("plain_requests: 'refuse' leaves nothing for a server with student_weights 'none'.")
        if self.student_model_path is None:
            for name in ("student_revision", "student_max_total_tokens"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name}: has no effect without student_model_path.")
        if self.teacher_model_path is None:
            for name in ("teacher_revision", "teacher_max_total_tokens", "teacher_chat_template"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name}: has no effect without teacher_model_path.")
        else:
            for name in ("student_model_path", "student_lora_path"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name}: with teacher_model_path the served model is the student; leave it out.")
            if self.student_chat_template is not None:
                raise ValueError(
                    "student_chat_template: with teacher_model_path the served model is the student, whose template is "
                    "SGLang's chat_template; give that, and teacher_chat_template for the teacher."
                )
            if self.mixing_mode != "lockstep":
                raise ValueError(
                    "mixing_mode: a student that is the served model cannot draft; serve the teacher and give "
                    "student_model_path, or leave it out."
                )
            if kind == "none":
                raise ValueError("student_weights: 'none' does not go with teacher_model_path; give one of them.")
        if kind in ("none", "separate") and self.student_lora_path is not None:
            raise ValueError(f"student_lora_path: does not go with student_weights {kind!r}; it needs shared weights.")
        if self.student_chat_template is not None and kind == "none":
            raise ValueError("student_chat_template: has no effect with student_weights 'none'; leave it out.")
        if self.student_model_path is not None and kind == "none":
            raise ValueError("student_weights: 'none' does not go with student_model_path; give one of them.")
        return self

    @property
    def host(self) -> Literal["teacher", "student"]:
        """The side of the model that SGLang serves (``--model-path``)."""
        return "teacher" if self.teacher_model_path is None else "student"

    @property
    def guest(self) -> Literal["teacher", "student"]:
        """The side of the other model."""
        return "student" if self.teacher_model_path is None else "teacher"

    @property
    def guest_path(self) -> str:
        """The other model of a resolved configuration.

        Raises:
            RuntimeError: there is none, or it has not been resolved.
        """
        return self.student_path if self.teacher_model_path is None else self.teacher_model_path

    @property
    def guest_revision(self) -> str | None:
        return self.student_revision if self.teacher_model_path is None else self.teacher_revision

    @property
    def guest_chat_template(self) -> str | None:
        return self.student_chat_template if self.teacher_model_path is None else self.teacher_chat_template

    @property
    def plain_sides(self) -> list[str]:
        """The sides that a plain request is for: the served model's, and the other where it is the same in all."""
        if self.plain_requests == "refuse":
            return []
        same = self.shared_weights and self.student_lora_path is None and self.guest_chat_template is None
        return ["teacher", "student"] if same else [self.host]

    @property
    def guest_max_total_tokens(self) -> int | None:
        return self.student_max_total_tokens if self.teacher_model_path is None else self.teacher_max_total_tokens

    @property
    def longest_draft(self) -> int:
        """The most tokens that the student drafts in one step; 0: lockstep."""
        return self.DRAFT_TOKENS[self.mixing_mode] if self.draft_tokens is None else self.draft_tokens

    def checks_itself(self, has_accelerator: bool) -> bool:
        """Whether the mixing is checked before a request is served."""
        return has_accelerator if self.mixing_self_check is None else self.mixing_self_check == "on"

    @property
    def student_path(self) -> str:
        """``student_model_path`` of a resolved configuration.

        Raises:
            RuntimeError: there is no student, or it has not been resolved.
        """
        if self.student_model_path is None:
            raise RuntimeError("the configuration has no student, or has not been resolved")
        return self.student_model_path

    def _check_policy(self) -> None:
        is_adapter = self.policy == "student" and self.student_lora_path is not None
        if self.shared_weights and self.policy in ("student", "teacher") and not is_adapter:
            raise ValueError(
                f"policy: {self.policy!r} has no weights of its own where both sides share them; leave it out, or "
                "give student_weights 'separate'."
            )

    @property
    def updated(self) -> Literal["student", "teacher", "both"]:
        """Whose weights updates are for, of a resolved configuration."""
        if self.policy is not None:
            return self.policy
        return "both" if self.shared_weights and self.student_lora_path is None else "student"

    def is_updated(self, side: str) -> bool:
        """Whether ``side`` is the policy, of a resolved configuration."""
        return self.updated in (side, "both")

    @property
    def has_student(self) -> bool:
        """Whether there is to be a student."""
        return self.student_weights != "none"

    def resolved(self, served_path: str, served_revision: str | None) -> MixingConfig:
        """The configuration with the student and ``shared_weights`` decided, once the served model is known.

        Raises:
            ValueError: shared weights of two different models, with a pool of the student's own, or with drafts.
        """
        if not self.has_student:
            return self
        known = self._with_student if self.teacher_model_path is None else self._with_teacher
        config = known(served_path, served_revision)
        config._check_policy()
        if config.shared_weights and config.longest_draft > 0:
            if config.mixing_mode == "speculative":
                raise ValueError(
                    "mixing_mode: 'speculative' gains nothing with shared weights, where a draft costs a forward of "
                    "the teacher; give a smaller student_model_path, or leave it out."
                )
            return config.model_copy(update={"draft_tokens": 0})
        return config

    def _with_teacher(self, student_path: str, student_revision: str | None) -> MixingConfig:
        same = self.teacher_model_path == student_path and self.teacher_revision in (None, student_revision)
        if self.student_weights == "shared" and not same:
            raise ValueError("student_weights: 'shared' needs the served model's own path as teacher_model_path.")
        shared = same and self._shares("teacher", self.teacher_max_total_tokens)
        served: dict[str, Any] = {"student_model_path": student_path, "student_revision": student_revision}
        revision = student_revision if same else self.teacher_revision
        return self.model_copy(update={**served, "teacher_revision": revision, "shared_weights": shared})

    def _with_student(self, teacher_path: str, teacher_revision: str | None) -> MixingConfig:
        if self.student_model_path is None:
            itself: dict[str, Any] = {"student_model_path": teacher_path, "student_revision": teacher_revision}
            itself["shared_weights"] = self.student_weights != "separate"
            return self.model_copy(update=itself)
        same = self.student_model_path == teacher_path and self.student_revision in (None, teacher_revision)
        if self.student_weights == "shared" and not same:
            raise ValueError("student_weights: 'shared' needs the teacher's own path as student_model_path.")
        if self.student_lora_path is not None and (not same or self.student_max_total_tokens is not None):
            raise ValueError(
                "student_lora_path: the adapter runs on the teacher's weights and in its KV pool; give neither a "
                "student_model_path of another model nor student_max_total_tokens."
            )
        shared = same and self._shares("student", self.student_max_total_tokens)
        revision = teacher_revision if same else self.student_revision
        return self.model_copy(update={"student_revision": revision, "shared_weights": shared})

    def _shares(self, guest: str, pool: int | None) -> bool:
        """Whether a guest of the served model's own path, with a ``pool`` of its own or None, is loaded once with it.

        Raises:
            ValueError: it is to, and has a pool.
        """
        if self.student_weights == "shared" and pool is not None:
            raise ValueError(f"{guest}_max_total_tokens: a {guest} with shared weights has no pool of its own.")
        return self.student_weights != "separate" and pool is None


OWN_TEMPLATE = "own"
"""A ``…_chat_template`` that is none of SGLang's ``--chat-template``: the model's own."""
ALPHA_KEYS = tuple(AlphaSettings.model_fields)
_NO_SETTINGS = ("alpha", "shared_weights", "tokens_of_one")
SETTINGS: dict[str, FieldInfo] = {
    **{name: field for name, field in MixingConfig.model_fields.items() if name not in _NO_SETTINGS},
    **AlphaSettings.model_fields,
}
"""{name: declaration} of every setting: the flat keys of the section ``mixing``, the flags, and the arguments."""


def takes_settings(names: Iterable[str]) -> Callable[[F], F]:
    """Show the settings that a function takes as ``**arguments`` by name, in its signature."""

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        *others, rest = signature.parameters.values()
        settings = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Any) for name in names
        ]
        function.__signature__ = signature.replace(parameters=[*others, *settings, rest])  # type: ignore[attr-defined]
        return function

    return decorate


DISTILL_SECTIONS = ("data", "contexts", "sampling", "escalate", "filters", "select", "output", "client")
"""Sections of a distillation run (`sglang_optimal.distill.config`), which a server skips."""


def load_yaml(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a server configuration file.

    The file has two optional sections: ``mixing`` (the keys `SETTINGS`) and ``server`` (any argument of
    SGLang's ServerArgs, with underscores). Those of a distillation run may be there too.

    Returns:
        (mixing values, server values), both flat dicts.

    Raises:
        ValueError: the file is missing, is not a mapping, or has an unknown key.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"--config: no such file: {path}")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--config: cannot read {path}: {error}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"--config: {path} is not valid YAML: {error}") from None
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise ValueError(f"--config: {path} must hold a mapping with the sections 'mixing' and 'server'.")
    check_known(data, ("mixing", "server", *DISTILL_SECTIONS), str(path))
    sections = []
    for name in ("mixing", "server"):
        section = data.get(name)
        section = {} if section is None else section
        if not isinstance(section, dict):
            raise ValueError(f"{path}: section {name!r} must be a mapping.")
        sections.append(section)
    check_known(sections[0], SETTINGS, f"{path}: mixing")
    return sections[0], sections[1]

"""Server-level mixing settings, and YAML files that set them. Unknown keys are errors that name the nearest key."""

from __future__ import annotations

import dataclasses
import difflib
import math
from pathlib import Path
from typing import Any

import yaml

ALPHA_METHODS = ("kl_symmetry", "ess_balance", "reverse_kl_symmetry", "entropy", "fixed")
"""Names in the order of ``sglang_optimal.mixing.AlphaMethod``; kept apart so that parsing needs no torch."""


def check_known(keys, allowed, where: str) -> None:
    """Raise ValueError for the first key that is not allowed, with the nearest allowed name."""
    for key in keys:
        if key not in allowed:
            near = difflib.get_close_matches(str(key), list(allowed), n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            if not near and len(allowed) <= 20:  # SGLang's hundreds of arguments would bury the message
                hint = f" Known: {', '.join(sorted(allowed))}."
            raise ValueError(f"{where}: unknown key {key!r}.{hint}")


def override(values: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``over`` on top of ``values``; None in ``over`` counts as absent.

    ``fixed_alpha`` alone means the method ``fixed``; another method drops an older ``fixed_alpha``.
    """
    over = {k: v for k, v in over.items() if v is not None}
    if "fixed_alpha" in over:
        over.setdefault("alpha_method", "fixed")
    elif "alpha_method" in over and over["alpha_method"] != "fixed":
        over["fixed_alpha"] = None
    return {**values, **over}


LARGEST_FIXED_ALPHA = 1e6
"""Beyond it a weighted sum of two float32 log-probabilities may be infinite."""


@dataclasses.dataclass(frozen=True)
class AlphaSettings:
    """How alpha is chosen for every token of one request.

    Attributes:
        alpha_method: one of ``ALPHA_METHODS``.
        alpha_min, alpha_max: bounds in [0, 1] that the solved alpha is clamped to; not used by ``fixed``.
        fixed_alpha: weight of the teacher for ``fixed``; may lie outside [0, 1] (guidance, contrastive decoding).

    Raises:
        ValueError: unknown method, bounds out of order or range, or ``fixed`` without ``fixed_alpha``.
    """

    alpha_method: str = "kl_symmetry"
    alpha_min: float = 0.0
    alpha_max: float = 1.0
    fixed_alpha: float | None = None

    def __post_init__(self) -> None:
        if self.alpha_method not in ALPHA_METHODS:
            near = difflib.get_close_matches(str(self.alpha_method), ALPHA_METHODS, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"alpha_method: {self.alpha_method!r} is not one of {', '.join(ALPHA_METHODS)}.{hint}")
        for name in ("alpha_min", "alpha_max", "fixed_alpha"):
            value = getattr(self, name)
            if value is None and name == "fixed_alpha":
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"{name}: must be a finite number, got {value!r}.")
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
        if self.alpha_method == "fixed" and self.fixed_alpha is None:
            raise ValueError("fixed_alpha: required when alpha_method is 'fixed'.")
        if self.alpha_method != "fixed" and self.fixed_alpha is not None:
            raise ValueError(f"fixed_alpha: only read when alpha_method is 'fixed', not {self.alpha_method!r}.")

    def updated(self, values: dict[str, Any]) -> AlphaSettings:
        """A copy with ``values`` on top, as `override` does it."""
        return AlphaSettings(**override(dataclasses.asdict(self), values))


@dataclasses.dataclass(frozen=True)
class MixingConfig:
    """What a server knows about mixing, beside SGLang's own ServerArgs.

    Attributes:
        student_model_path: Hugging Face id or folder of the student; None: the teacher, see `settled`.
        student_revision: revision of the student on the hub.
        student_max_total_tokens: upper bound on the student's KV pool, in tokens; None: as many as the teacher's.
        student_weights: ``shared``: the student is the teacher, whose weights are loaded once; both contexts are rows
            of one forward and share one KV pool and radix cache. ``separate``: weights and KV of its own, which can be
            updated. ``auto``: shared when both paths are the same. ``none``: no student; SGLang's own server.
        student_lora_path: a LoRA adapter of the teacher (Hugging Face id or folder in peft's format) that makes it the
            student; needs shared weights. The student's rows run with it, in the same forward.
        plain_requests: ``allow``, or ``refuse`` requests without a student context: something on the way may have
            dropped it (sglang-router drops ``custom_params``), and the teacher alone is not what was asked for.
        mixing_mode: ``lockstep``: one token a step; ``speculative``: the student drafts ``draft_tokens`` tokens which
            the teacher verifies in one forward, without any change to what is sampled; ``auto``: as many drafts as pay,
            up to ``draft_tokens``, or none. Drafting needs a student with weights of its own.
        draft_tokens: see ``mixing_mode``; None: `DRAFT_TOKENS` of it.
        mixing_self_check: ``on`` or ``off``: whether to compare, before any request is served, both sides' logits with
            those of each model alone, and not to start where they differ; None: on wherever there is an accelerator.
        alpha: defaults for requests that do not say.
        shared_weights: what ``student_weights`` came to, see `settled`.
    """

    student_model_path: str | None = None
    student_revision: str | None = None
    student_max_total_tokens: int | None = None
    student_weights: str = "auto"
    student_lora_path: str | None = None
    plain_requests: str = "allow"
    mixing_mode: str = "lockstep"
    draft_tokens: int | None = None
    mixing_self_check: str | None = None
    alpha: AlphaSettings = AlphaSettings()
    shared_weights: bool = False

    ALPHA_KEYS = ("alpha_method", "alpha_min", "alpha_max", "fixed_alpha")
    STUDENT_KEYS = (
        "student_model_path",
        "student_revision",
        "student_max_total_tokens",
        "student_weights",
        "student_lora_path",
        "plain_requests",
        "mixing_mode",
        "draft_tokens",
        "mixing_self_check",
    )
    STUDENT_WEIGHTS = ("auto", "shared", "separate", "none")
    PLAIN_REQUESTS = ("allow", "refuse")
    SELF_CHECK = ("on", "off")
    DRAFT_TOKENS = {"lockstep": 0, "speculative": 4, "auto": 8}
    MAX_DRAFT_TOKENS = 32

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "mixing") -> MixingConfig:
        """Build from flat keys (``STUDENT_KEYS`` + ``ALPHA_KEYS``); None values count as absent."""
        check_known(values, cls.STUDENT_KEYS + cls.ALPHA_KEYS, where)
        for name in ("student_model_path", "student_revision", "student_lora_path"):
            value = values.get(name)
            if value is not None and (not isinstance(value, str) or not value):
                raise ValueError(f"{name}: must be a non-empty string, got {value!r}.")
        limit = values.get("student_max_total_tokens")
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit <= 0):
            raise ValueError(f"student_max_total_tokens: must be a positive integer, got {limit!r}.")
        kind = values.get("student_weights")
        if kind is not None and kind not in cls.STUDENT_WEIGHTS:
            raise ValueError(f"student_weights: {kind!r} is not one of {', '.join(cls.STUDENT_WEIGHTS)}.")
        plain = values.get("plain_requests")
        if plain is not None and plain not in cls.PLAIN_REQUESTS:
            raise ValueError(f"plain_requests: {plain!r} is not one of {', '.join(cls.PLAIN_REQUESTS)}.")
        check = cls.on_or_off(values.get("mixing_self_check"))
        values = {**values, "mixing_self_check": check}
        if check is not None and check not in cls.SELF_CHECK:
            raise ValueError(f"mixing_self_check: {check!r} is not one of {', '.join(cls.SELF_CHECK)}.")
        mode, drafts = values.get("mixing_mode"), values.get("draft_tokens")
        if mode is not None and mode not in cls.DRAFT_TOKENS:
            raise ValueError(f"mixing_mode: {mode!r} is not one of {', '.join(cls.DRAFT_TOKENS)}.")
        if drafts is not None:
            if isinstance(drafts, bool) or not isinstance(drafts, int) or not 0 <= drafts <= cls.MAX_DRAFT_TOKENS:
                raise ValueError(f"draft_tokens: must be an integer from 0 to {cls.MAX_DRAFT_TOKENS}, got {drafts!r}.")
            if mode in (None, "lockstep"):
                raise ValueError("draft_tokens: needs mixing_mode 'speculative' or 'auto'; lockstep drafts nothing.")
        if plain == "refuse" and kind == "none":
            raise ValueError("plain_requests: 'refuse' leaves nothing for a server with student_weights 'none'.")
        if values.get("student_model_path") is None:
            for name in ("student_revision", "student_max_total_tokens"):
                if values.get(name) is not None:
                    raise ValueError(f"{name}: has no effect without student_model_path.")
        if kind in ("none", "separate") and values.get("student_lora_path") is not None:
            raise ValueError(f"student_lora_path: does not go with student_weights {kind!r}; it needs shared weights.")
        if values.get("student_model_path") is not None and kind == "none":
            raise ValueError("student_weights: 'none' does not go with student_model_path; give one of them.")
        alpha = AlphaSettings().updated({k: v for k, v in values.items() if k in cls.ALPHA_KEYS})
        return cls(**{k: v for k, v in values.items() if k in cls.STUDENT_KEYS and v is not None}, alpha=alpha)

    @property
    def longest_draft(self) -> int:
        """The most tokens that the student drafts in one step; 0: lockstep."""
        return self.DRAFT_TOKENS[self.mixing_mode] if self.draft_tokens is None else self.draft_tokens

    @classmethod
    def on_or_off(cls, value: Any) -> Any:
        """A value of ``mixing_self_check`` as it was written: YAML makes booleans of on and off."""
        return cls.SELF_CHECK[not value] if isinstance(value, bool) else value

    def checks_itself(self, has_accelerator: bool) -> bool:
        """Whether the mixing is checked before a request is served."""
        return has_accelerator if self.mixing_self_check is None else self.mixing_self_check == "on"

    @property
    def mixes(self) -> bool:
        """Whether there is to be a student."""
        return self.student_weights != "none"

    def settled(self, teacher_path: str, teacher_revision: str | None) -> MixingConfig:
        """The configuration with the student and ``shared_weights`` decided, once the teacher is known.

        Raises:
            ValueError: shared weights of two different models, with a pool of the student's own, or with drafts.
        """
        if not self.mixes:
            return self
        config = self._with_student(teacher_path, teacher_revision)
        if config.shared_weights and config.longest_draft > 0:
            if config.mixing_mode == "speculative":
                raise ValueError(
                    "mixing_mode: 'speculative' gains nothing with shared weights, where a draft costs a forward of "
                    "the teacher; give a smaller student_model_path, or leave it out."
                )
            return dataclasses.replace(config, draft_tokens=0)
        return config

    def _with_student(self, teacher_path: str, teacher_revision: str | None) -> MixingConfig:
        if self.student_model_path is None:
            itself = {"student_model_path": teacher_path, "student_revision": teacher_revision}
            return dataclasses.replace(self, **itself, shared_weights=self.student_weights != "separate")
        same = self.student_model_path == teacher_path and self.student_revision in (None, teacher_revision)
        if self.student_weights == "shared" and not same:
            raise ValueError("student_weights: 'shared' needs the teacher's own path as student_model_path.")
        if self.student_lora_path is not None and (not same or self.student_max_total_tokens is not None):
            raise ValueError(
                "student_lora_path: the adapter runs on the teacher's weights and in its KV pool; give neither a "
                "student_model_path of another model nor student_max_total_tokens."
            )
        shared = same and self.student_weights != "separate"
        if shared and self.student_max_total_tokens is not None:
            if self.student_weights == "shared":
                raise ValueError("student_max_total_tokens: a student with shared weights has no pool of its own.")
            shared = False
        revision = teacher_revision if same else self.student_revision
        return dataclasses.replace(self, student_revision=revision, shared_weights=shared)


DISTILL_SECTIONS = ("data", "contexts", "sampling", "filters", "output", "client")
"""Sections of a distillation run (`sglang_optimal.distill.config`), which a server skips."""


def load_yaml(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a server configuration file.

    The file has two optional sections: ``mixing`` (the flat keys of MixingConfig) and ``server`` (any argument of
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
    check_known(sections[0], MixingConfig.STUDENT_KEYS + MixingConfig.ALPHA_KEYS, f"{path}: mixing")
    return sections[0], sections[1]

"""Which settings make a run the run that it is, and which may change while it goes on."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from sglang_optimal.distill.config import DistillConfig, parse_config
from sglang_optimal.distill.escalation import mixing_of_step
from sglang_optimal.distill.section import Section

FREE = {
    "data": ("limit",),
    "sampling": ("n",),
    "output": ("dir", "shard_records"),
}
"""Keys that may change: they decide how many records there are and where, not what a record is. So may the sections
``client`` and ``server``, and `grown` strategies."""

_LATER = {
    "contexts": ("teacher_chat_template_kwargs", "student_chat_template_kwargs"),
    "mixing": ("student_chat_template", "teacher_chat_template"),
}
"""Keys that older versions had not got: left out of the fingerprint where they say nothing."""


def fingerprint(config: DistillConfig) -> str:
    """Hash of the settings that decide what a record is. More problems or samples, other servers: the same run."""
    return hashlib.sha256(json.dumps(_identity(config), sort_keys=True).encode()).hexdigest()[:16]


def _identity(config: DistillConfig) -> dict[str, Any]:
    values = config.model_dump(mode="json", exclude={"client": True, "server": True})
    for section, names in FREE.items():
        for name in names:
            values[section].pop(name)
    # As it was before there were such keys.
    if not values["output"]["return_top_k"]:
        for name in ("return_top_k", "top_k_of"):
            values["output"].pop(name)
    if values["sampling"]["one_model"] == "auto":
        values["sampling"].pop("one_model")
    for section in ("select", "escalate"):
        if values[section] is None:
            values.pop(section)
    values.get("escalate", {}).pop("accept", None)  # it decides how many records there are
    for section, names in _LATER.items():
        for name in names:
            if not values[section][name]:
                values[section].pop(name)
    return values


def stored_config(manifest: dict[str, Any]) -> DistillConfig | None:
    """The settings in a run.json; None where there are none, or this version does not read them."""
    try:
        return parse_config(manifest.get("config") or {})
    except ValueError:
        return None


def is_same(manifest: dict[str, Any], config: DistillConfig) -> bool:
    """Whether a run may go on with these settings, its records being what they would be with them.

    That is so where no setting differs but those of `FREE`, ``escalate.accept`` and the sections ``client`` and
    ``server``, where steps were added behind the others, or where the strategies have `grown`.
    """
    if manifest.get("fingerprint") == fingerprint(config):
        return True
    old = stored_config(manifest)
    if old is None:
        return False
    if old.escalate is not None and config.escalate is not None:
        taken = old.escalate.steps
        if config.escalate.steps[: len(taken)] == taken:
            old = old.model_copy(update={"escalate": config.escalate})
    # Keys that a later version added have their defaults now, and had no place in the old fingerprint.
    return fingerprint(old) == fingerprint(config) or grown(old, config)


def grown(old: DistillConfig, new: DistillConfig) -> bool:
    """Whether ``new`` only adds strategies, every sample of ``old`` being one of ``new`` under the same id.

    With ``select: cross`` every strategy is sampled for every problem, so that an id (problem, strategy, number) and
    its seed do not depend on the other strategies or on weights. The samples that ``select: sample`` drew are a part
    of those. With ``select: sample`` another strategy changes which one each number draws.
    """
    if new.contexts.select != "cross":
        return False
    strategies = {strategy.name: strategy for strategy in new.contexts.strategies}
    for strategy in old.contexts.strategies:
        now = strategies.get(strategy.name)
        if now is None or now.model_copy(update={"weight": strategy.weight}) != strategy:
            return False
    more = {"strategies": new.contexts.strategies, "select": new.contexts.select}
    return fingerprint(old.model_copy(update={"contexts": old.contexts.model_copy(update=more)})) == fingerprint(new)


def refusal(manifest: dict[str, Any], config: DistillConfig) -> str:
    """Why a run may not go on with other settings, and what to do."""
    names = changed(manifest.get("config") or {}, config.model_dump(mode="json"))
    text = f"holds a run with other settings ({', '.join(names[:4]) or 'another version'}); "
    if names == ["filters"]:
        return text + (
            "what was sampled can be judged anew without sampling: python -m sglang_optimal.distill filter RUN "
            "--config FILE --out RUN2. Or give another --out, or the old settings to resume it."
        )
    if set(names) <= {"contexts.strategies", "contexts.select"}:
        return text + (
            "a run can be given more strategies with contexts.select: cross, where those that it has stay as they are "
            "(with select: sample the draw would be another one). Or give another --out, or the old settings to resume "
            "it."
        )
    return text + "give another --out, or the old settings to resume it."


def changed(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The keys that differ, of those that may not."""
    names = []
    for section, values in new.items():
        default = DistillConfig.model_fields[section].get_default(call_default_factory=True)
        before = old.get(section, default.model_dump(mode="json") if isinstance(default, Section) else default)
        if section in ("client", "server") or values == before:
            continue
        if section == "escalate":
            names += [section] if values is None or before is None or values["steps"] != before["steps"] else []
        elif isinstance(values, dict) and isinstance(before, dict):
            # Older versions had fewer keys.
            keys: Any = DistillConfig.model_fields[section].annotation
            defaults = {k: field.get_default(call_default_factory=True) for k, field in keys.model_fields.items()}
            free = FREE.get(section, ())
            names += [f"{section}.{k}" for k in values if values[k] != before.get(k, defaults[k]) and k not in free]
        else:
            names.append(section)
    return names


def step_configs(config: DistillConfig) -> list[DistillConfig]:
    """The settings of each step; those of the run where it has none."""
    if config.escalate is None:
        return [config]
    mixing, kind = config.mixing.given(), type(config.mixing)
    return [
        config.model_copy(update={"mixing": kind(**mixing_of_step(mixing, step)), "escalate": None})
        for step in config.escalate.steps
    ]

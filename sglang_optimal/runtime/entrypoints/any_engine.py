"""Any SGLang process becomes ours where ``SGLANG_OPTIMAL_CONFIG`` is set: ``sglang serve``, ``sgl.Engine``, and
trainers that call ``Engine._launch_subprocesses`` themselves.

The variable holds the section ``mixing`` of a configuration: a YAML file's path, or JSON. The plugin's entry point
hooks what every launch passes through. Most launches load plugins before they resolve their arguments, and there the
whole configuration is settled, as in our own launcher (`_settle`). A program that calls ``_launch_subprocesses`` at
once loads them in the middle of it; then the arguments are resolved already, and what has to be known before is refused
(`_settle_late`).
"""

from __future__ import annotations

import json
import os
import pkgutil
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from sglang_optimal.config import MixingConfig, load_yaml
from sglang_optimal.names import SETTLED

VARIABLE = "SGLANG_OPTIMAL_CONFIG"

_RESOLVE = "sglang.srt.server_args.ServerArgs.resolve_once"
_CHECK = "sglang.srt.server_args.ServerArgs.check_server_args"
_LAUNCH = "sglang.srt.entrypoints.engine.Engine._launch_scheduler_processes"
_STARTED = "sglang.srt.entrypoints.engine.Engine._set_startup_time"
_MANAGER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
_TEMPLATES = "sglang.srt.parser.template_manager.TemplateManager.initialize_templates"


def is_wanted() -> bool:
    """Whether SGLang's own launches are to be ours."""
    return bool(os.environ.get(VARIABLE))


def config_of_environment() -> MixingConfig:
    """What the variable says.

    Raises:
        ValueError: it is no configuration; names the variable.
    """
    text = os.environ[VARIABLE].strip()
    try:
        if text.startswith("{"):
            values = json.loads(text)
            if not isinstance(values, dict):
                raise ValueError("must be a mapping.")
            values = values.get("mixing", values)
        else:
            values, server = load_yaml(text)
            if server:
                raise ValueError("the section 'server' is not read here; give SGLang's arguments where it is started.")
        return MixingConfig.from_dict(values)
    except ValueError as error:  # of json too
        raise ValueError(f"{VARIABLE}: {error}") from None


def install() -> None:
    """Hook SGLang's launches. SGLang would go on without a plugin that fails, and answer with one model alone, so that
    failures end the process."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from sglang_optimal.runtime import launch

    try:
        launch.check_sglang_version()
        config_of_environment()
        for target in (_RESOLVE, _CHECK, _LAUNCH, _STARTED, _MANAGER, _TEMPLATES):
            pkgutil.resolve_name(target)
    except (ValueError, AttributeError, ImportError) as error:
        _leave(f"{error}")
    HookRegistry.register(_RESOLVE, _settle, HookType.AROUND)
    HookRegistry.register(_CHECK, _settle_late, HookType.AROUND)
    HookRegistry.register(_LAUNCH, _launch, HookType.AROUND)
    HookRegistry.register(_STARTED, _check_manager, HookType.AROUND)
    HookRegistry.register(_MANAGER, _manager_class(), HookType.REPLACE)
    HookRegistry.register(_TEMPLATES, _init_chat_sides, HookType.AFTER)


def _leave(reason: str) -> NoReturn:
    print(f"sglang_optimal: error: {reason}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def _settle(original: Callable[[Any], None], server_args: Any) -> None:
    """Before SGLang resolves the arguments of a launch: ours among them."""
    if hasattr(server_args, SETTLED) or getattr(server_args, "_resolution_finished", False):
        return original(server_args)
    from sglang_optimal.runtime import launch

    config = config_of_environment().resolved(server_args.model_path, server_args.revision)
    setattr(server_args, SETTLED, config)
    for name, value in launch.server_defaults(config).items():
        if not getattr(server_args, name):
            setattr(server_args, name, value)
    launch.check_server_args(server_args, config)
    config = launch.check_models(server_args, config)
    setattr(server_args, SETTLED, config)
    launch.resolve(server_args, config)


def _settle_late(original: Callable[[Any], None], server_args: Any) -> None:
    """After SGLang has resolved the arguments, and before it publishes them."""
    if hasattr(server_args, SETTLED):
        return original(server_args)
    from sglang.srt.arg_groups.overrides import declare_resolution

    from sglang_optimal.runtime import launch

    config = config_of_environment().resolved(server_args.model_path, server_args.revision)
    if config.longest_draft or config.student_lora_path is not None:
        raise ValueError(
            f"{VARIABLE}: drafts and a student that is an adapter have to be known before SGLang resolves its "
            "arguments; call sglang.srt.plugins.load_plugins() before the launch."
        )
    setattr(server_args, SETTLED, config)
    launch.check_server_args(server_args, config)
    config = launch.check_models(server_args, config)
    setattr(server_args, SETTLED, config)
    declare_resolution(server_args, "sglang_optimal", **launch.server_defaults(config))
    launch.check_resolved(server_args, config)
    original(server_args)


def _launch(original: Callable, cls: type, server_args: Any, port_args: Any, run_scheduler: Callable, **more: Any):
    """The scheduler processes of a launch, with a student in them."""
    config = getattr(server_args, SETTLED, None)
    if config is None or config.student_model_path is None:
        return original(cls, server_args, port_args, run_scheduler, **more)
    from sglang.srt.managers.scheduler import run_scheduler_process

    from sglang_optimal.runtime.managers import scheduler

    if run_scheduler is not run_scheduler_process:
        raise ValueError(
            f"{VARIABLE}: the launch brings a scheduler process of its own, {run_scheduler!r}, which cannot be ours."
        )
    _add_routes(config)
    return original(cls, server_args, port_args, scheduler.scheduler_process(config), **more)


def _add_routes(config: MixingConfig) -> None:
    """To SGLang's HTTP application, where the launch is a server's."""
    if "sglang.srt.entrypoints.http_server" in sys.modules:
        from sglang_optimal.runtime.entrypoints import http_server

        http_server.install(config)


def _check_manager(original: Callable, manager: Any, *args: Any) -> None:
    """A launch whose tokenizer manager is not ours would answer mixed requests with one model alone."""
    from sglang_optimal.runtime.managers.tokenizer_manager import MixedTokenizerManager

    if not isinstance(manager, MixedTokenizerManager):
        raise ValueError(f"{VARIABLE}: the launch brings a tokenizer manager of its own, {type(manager).__name__}.")
    original(manager, *args)


def _init_chat_sides(_: None, templates: Any, tokenizer_manager: Any, *args: Any, **kwargs: Any) -> None:
    if getattr(tokenizer_manager, "takes_templates", False):
        tokenizer_manager.init_chat_sides(templates)


def _manager_class() -> type:
    from sglang_optimal.runtime.managers.tokenizer_manager import MixedTokenizerManager

    class LaunchedTokenizerManager(MixedTokenizerManager):
        """The manager of a launch of SGLang's, which gives it no arguments of ours."""

        takes_templates = True

        def __init__(self, server_args: Any, *args: Any, **kwargs: Any):
            config = getattr(server_args, SETTLED, None) or MixingConfig(student_weights="none")
            super().__init__(server_args, *args, **{"mixing_config": config, **kwargs})

    return LaunchedTokenizerManager

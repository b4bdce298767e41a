"""``python -m sglang_optimal.launch_server``: SGLang's HTTP server with a student model.

Takes every SGLang flag, and ours; see ``--help``. Bad arguments exit with status 2 before any model is loaded.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from types import UnionType
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from sglang_optimal.config import SETTINGS, MixingConfig, check_known, load_yaml, override
from sglang_optimal.server_process import PortTaken, hold_port


def mixing_parser() -> argparse.ArgumentParser:
    """The parser of our own flags; SGLang parses the rest."""
    parser = argparse.ArgumentParser(prog="sglang_optimal.launch_server", add_help=False, allow_abbrev=False)
    group = parser.add_argument_group("mixing")
    for name, field in SETTINGS.items():
        group.add_argument("--" + name.replace("_", "-"), type=_kind(field), help=_help(field))
    group.add_argument("--config", help="YAML with the sections 'mixing' and 'server'; flags win over it.")
    return parser


def _kinds(field: FieldInfo) -> set[Any]:
    """What a setting may be, without the checks and without None."""
    several = get_origin(field.annotation) in (Union, UnionType)
    kinds = set(get_args(field.annotation)) if several else {field.annotation}
    return {get_args(kind)[0] if get_origin(kind) is Annotated else kind for kind in kinds}


def _kind(field: FieldInfo) -> type:
    """What argparse makes of a setting's text; the values are checked by the declaration."""
    return next((kind for kind in (float, int) if kind in _kinds(field)), str)


def _help(field: FieldInfo) -> str:
    choices = [choice for kind in _kinds(field) if get_origin(kind) is Literal for choice in get_args(kind)]
    text = " ".join((field.description or "").split()).replace("``", "")
    return f"{', '.join(choices)}. {text}" if choices else text


def restart_parser() -> argparse.ArgumentParser:
    """The parser of the flag that is not the server's, but that of the process which starts it."""
    parser = argparse.ArgumentParser(prog="sglang_optimal.launch_server", add_help=False, allow_abbrev=False)
    parser.add_argument(
        "--max-restarts", type=int, default=0, help="Start the server again when it dies, up to this often in a row."
    )
    return parser


def parse(argv: list[str]):
    """Split the command line into (SGLang's ServerArgs, MixingConfig).

    Raises:
        ValueError: a mixing flag, the YAML file or a combination is wrong.
        SystemExit: SGLang's own parser refused a flag (status 2), or ``--help``.
    """
    parser = mixing_parser()
    if "-h" in argv or "--help" in argv:
        parser.print_help()
        print(restart_parser().format_help().partition("\n\n")[2])
        print("\nEvery SGLang flag follows:\n", flush=True)
    ours, rest = parser.parse_known_args(argv)
    flags = {k: v for k, v in vars(ours).items() if v is not None}
    config_path = flags.pop("config", None)
    mixing, server = load_yaml(config_path) if config_path is not None else ({}, {})
    config = _mixing_config(mixing, flags, config_path)

    from sglang_optimal.runtime import launch, plugin

    plugin.prepare()
    from sglang.srt.server_args import prepare_server_args

    # argparse keeps the last value of a flag: the command line wins over the file, and the file over our defaults.
    defaults = _as_flags({**launch.server_defaults(config), **server}, f"{config_path}: server")
    server_args = prepare_server_args(defaults + rest)
    config = config.resolved(server_args.model_path, server_args.revision)
    launch.check_server_args(server_args, config)
    return server_args, config


def _mixing_config(mixing: dict[str, Any], flags: dict[str, Any], config_path: str | None) -> MixingConfig:
    names = ["--" + name.replace("_", "-") for name in flags]
    try:
        config = MixingConfig.from_dict(override(mixing, flags))
    except ValueError as error:
        sources = names + ([f"the section 'mixing' of {config_path}"] if mixing else [])
        raise ValueError(f"{error} Set by {', '.join(sources)}.") from None
    # Defaults in a file may stay there for a server without a student; a flag asks for something now.
    idle = [name for name in names if name != "--student-weights"]
    if idle and not config.has_student:
        raise ValueError(f"{', '.join(idle)}: no effect with student_weights 'none'.")
    return config


class _SectionParser(argparse.ArgumentParser):
    """Raises instead of printing SGLang's long usage and leaving."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _as_flags(values: dict[str, Any], where: str = "server") -> list[str]:
    """The command line that says the same as ``values``: {field or flag of SGLang: value}; None counts as absent.

    Raises:
        ValueError: an unknown name, with the nearest one, or a value that SGLang's parser does not take.
    """
    from sglang.srt.server_args import ServerArgs

    parser = _SectionParser(add_help=False)
    ServerArgs.add_cli_args(parser)
    actions = {}
    for action in parser._actions:
        if action.dest != "config":  # SGLang's own file of flags; ours has been read
            names = action.option_strings[:1] if action.nargs == 0 else action.option_strings
            actions.update({name.lstrip("-").replace("-", "_"): action for name in (*names, action.dest)})
    flags: list[str] = []
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name in SETTINGS:
            raise ValueError(f"{where}: {name!r} belongs in the section 'mixing'.")
        check_known([name], actions, where)
        if value is not None:
            flags += _as_flag(actions[name], value, f"{where}: {name}")
    try:
        parser.parse_args(["--model-path=", *flags])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return flags


def _as_flag(action: argparse.Action, value: Any, where: str) -> list[str]:
    flag = action.option_strings[0]
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError(f"{where}: must be true or false, got {value!r}.")
        if value:
            return [flag]
        if isinstance(action, argparse.BooleanOptionalAction):
            return [flag.replace("--", "--no-", 1)]
        if action.default is None:
            raise ValueError(f"{where}: SGLang decides unless it is true, and has no flag for false; remove the key.")
        return []
    if isinstance(value, list) and action.nargs in ("+", "*"):
        return [flag, *map(_as_text, value)] if value or action.nargs == "*" else []
    if value is True and action.nargs == "?":
        return [flag]
    return [f"{flag}={_as_text(value)}"]  # in one piece, because the value may begin with a dash


def _as_text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, bool | dict | list) else str(value)


def serve(server_args, config: MixingConfig) -> None:
    """Run the server until it is stopped.

    Raises:
        PortTaken: before any model is loaded; SGLang would find it out afterwards, ask the other server whether it is
            ready, and wait for it.
    """
    from sglang.srt.entrypoints.http_server import app, launch_server
    from sglang.srt.managers.detokenizer_manager import run_detokenizer_process
    from sglang.srt.managers.scheduler import run_scheduler_process

    from sglang_optimal.platforms import cpu_processes
    from sglang_optimal.runtime import launch
    from sglang_optimal.runtime.entrypoints import body_guard
    from sglang_optimal.runtime.managers.tokenizer_manager import tokenizer_manager_init

    scheduler_process: Callable[..., None] = run_scheduler_process
    if config.student_model_path is None:
        if any(getattr(server_args, name) for name in launch.OTHER_FRONT_ENDS):
            from sglang.launch_server import run_server

            return run_server(server_args)
        body_guard.install(app, config)
    else:
        from sglang_optimal.runtime.entrypoints import http_server as routes
        from sglang_optimal.runtime.entrypoints.engine import MixedEngine

        routes.install(config)
        scheduler_process = MixedEngine.scheduler_process(config)
    with cpu_processes.fork_server.used(server_args), hold_port(server_args.host, server_args.port):
        launch_server(
            server_args,
            init_tokenizer_manager_func=tokenizer_manager_init(config),
            run_scheduler_process_func=cpu_processes.InChild(scheduler_process),
            run_detokenizer_process_func=cpu_processes.InChild(run_detokenizer_process),
        )


def start_server_process(context, teacher: str, config: MixingConfig, arguments: dict[str, Any]):
    """Check everything here, then serve in a process of its own.

    Args:
        context: a multiprocessing context.
        teacher: the teacher's path.
        config: the student and the defaults.
        arguments: of SGLang's ServerArgs.

    Returns:
        (resolved ServerArgs, the started process)

    Raises:
        ValueError: as `sglang_optimal.runtime.launch.checked_server_args`.
    """
    from sglang_optimal.runtime import launch, plugin

    launch.check_sglang_version()
    plugin.prepare()
    server_args, config = launch.checked_server_args(teacher, config, arguments, "Runtime")
    with hold_port(server_args.host, server_args.port):
        pass  # said here, it is an exception of the caller's
    process = context.Process(target=serve, args=(server_args, config))
    process.start()
    return server_args, process


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    ours, rest = restart_parser().parse_known_args(argv)
    if ours.max_restarts < 0:
        print("sglang_optimal.launch_server: error: --max-restarts: must not be negative.", file=sys.stderr)
        return 2
    if ours.max_restarts and not {"-h", "--help"} & set(rest):
        from sglang_optimal.supervise import supervise

        return supervise([sys.executable, "-m", "sglang_optimal.launch_server", *rest], ours.max_restarts)
    return _run(rest)


def _run(argv: list[str]) -> int:
    from sglang_optimal.platforms import cpu_processes

    with cpu_processes.fork_server.begun():
        return _check_and_serve(argv)


def _check_and_serve(argv: list[str]) -> int:
    from sglang_optimal.platforms import cpu_processes
    from sglang_optimal.runtime import launch

    try:
        launch.check_sglang_version()
        with cpu_processes.without_gc():
            server_args, config = parse(argv)
            import sglang.srt.entrypoints.http_server  # noqa: F401
        config = launch.check_models(server_args, config)
        launch.resolve(server_args, config)
    except ValueError as error:
        print(f"sglang_optimal.launch_server: error: {error}", file=sys.stderr)
        return 2
    from sglang.srt.utils import kill_process_tree

    try:
        with launch.starting():
            serve(server_args, config)
    except (launch.SelfCheckFailed, PortTaken) as error:
        print(f"sglang_optimal.launch_server: error: {error}", file=sys.stderr)
        return 2
    finally:
        import os

        kill_process_tree(os.getpid(), include_parent=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""``python -m sglang_optimal.launch_server``: SGLang's HTTP server with a student model.

Takes every SGLang flag, and ours; see ``--help``. Bad arguments exit with status 2 before any model is loaded.
"""

from __future__ import annotations

import argparse
import sys

from sglang_optimal.config import ALPHA_METHODS, MixingConfig, load_yaml


def mixing_parser() -> argparse.ArgumentParser:
    """The parser of our own flags; SGLang parses the rest."""
    parser = argparse.ArgumentParser(prog="sglang_optimal.launch_server", add_help=False, allow_abbrev=False)
    group = parser.add_argument_group("mixing")
    group.add_argument("--student-model-path", help="Hugging Face id or folder of the student model.")
    group.add_argument("--student-revision", help="Revision of the student model.")
    group.add_argument("--student-max-total-tokens", type=int, help="Upper bound on the student's KV pool, in tokens.")
    group.add_argument("--alpha-method", help=f"Default for requests: {', '.join(ALPHA_METHODS)}.")
    group.add_argument("--alpha-min", type=float, help="Default lower bound on alpha.")
    group.add_argument("--alpha-max", type=float, help="Default upper bound on alpha.")
    group.add_argument("--fixed-alpha", type=float, help="Default alpha of the method 'fixed'; implies that method.")
    group.add_argument("--config", help="YAML with the sections 'mixing' and 'server'; flags win over it.")
    return parser


def parse(argv: list[str]):
    """Split the command line into (SGLang's ServerArgs, MixingConfig).

    Raises:
        ValueError: a mixing flag, the YAML file or a combination is wrong.
        SystemExit: SGLang's own parser refused a flag (status 2), or ``--help``.
    """
    from sglang.srt.plugins import load_plugins

    from sglang_optimal.runtime import launch, plugin

    parser = mixing_parser()
    if "-h" in argv or "--help" in argv:
        parser.print_help()
        print("\nEvery SGLang flag follows:\n", flush=True)
    ours, rest = parser.parse_known_args(argv)
    values = vars(ours)
    config_path = values.pop("config")
    mixing, server = load_yaml(config_path) if config_path else ({}, {})
    mixing = {**mixing, **{k: v for k, v in values.items() if v is not None}}
    config = MixingConfig.from_dict(mixing)
    load_plugins()
    plugin.register()
    from sglang.srt.server_args import prepare_server_args

    defaults = _as_flags({**launch.server_defaults(config), **server})
    server_args = prepare_server_args(defaults + rest)
    launch.check_server_args(server_args, config)
    return server_args, config


def _as_flags(values: dict) -> list[str]:
    flags: list[str] = []
    for key, value in values.items():
        name = "--" + key.replace("_", "-")
        if value is None or value is False:
            continue
        if value is True:
            flags.append(name)
        elif isinstance(value, list):
            flags += [name, *map(str, value)]
        else:
            flags += [name, str(value)]
    return flags


def serve(server_args, config: MixingConfig) -> None:
    """Run the server until it is stopped."""
    from sglang.srt.entrypoints.http_server import launch_server

    from sglang_optimal.runtime.tokenizer import tokenizer_manager_init

    kwargs = {}
    if config.student_model_path is not None:
        from sglang_optimal.runtime.scheduler import scheduler_process

        kwargs["run_scheduler_process_func"] = scheduler_process(config)
    launch_server(server_args, init_tokenizer_manager_func=tokenizer_manager_init(config), **kwargs)


def main(argv: list[str] | None = None) -> int:
    from sglang_optimal.runtime import launch

    try:
        server_args, config = parse(sys.argv[1:] if argv is None else argv)
        launch.check_models(server_args, config)
    except ValueError as error:
        print(f"sglang_optimal.launch_server: error: {error}", file=sys.stderr)
        return 2
    from sglang.srt.utils import kill_process_tree

    try:
        serve(server_args, config)
    finally:
        import os

        kill_process_tree(os.getpid(), include_parent=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""SGLang started in its own ways, with ``SGLANG_OPTIMAL_CONFIG`` in the environment: prints the answers as JSON.

``python launched.py engine|subprocesses ARGUMENTS REQUESTS``, both as JSON: of ServerArgs, and of ``Engine.generate``
"""

import asyncio
import json
import os
import sys


def engine(arguments: dict, requests: list[dict]) -> list[dict]:
    import sglang

    with sglang.Engine(**arguments) as started:
        return [started.generate(**request) for request in requests]


def subprocesses(arguments: dict, requests: list[dict]) -> list[dict]:
    """As trainers do it: SGLang's processes and its tokenizer manager, without its engine or its server."""
    from sglang.srt.entrypoints.engine import Engine, init_tokenizer_manager
    from sglang.srt.managers.detokenizer_manager import run_detokenizer_process
    from sglang.srt.managers.io_struct import GenerateReqInput
    from sglang.srt.managers.scheduler import run_scheduler_process
    from sglang.srt.server_args import ServerArgs
    from sglang.srt.utils import kill_process_tree

    manager, *_ = Engine._launch_subprocesses(
        server_args=ServerArgs(**arguments),
        init_tokenizer_manager_func=init_tokenizer_manager,
        run_scheduler_process_func=run_scheduler_process,
        run_detokenizer_process_func=run_detokenizer_process,
    )

    async def all_of_them() -> list[dict]:
        return [await anext(manager.generate_request(GenerateReqInput(**request), None)) for request in requests]

    answers = asyncio.new_event_loop().run_until_complete(all_of_them())
    print(json.dumps(answers), flush=True)
    kill_process_tree(os.getpid(), include_parent=False)
    os._exit(0)  # a trainer ends such a process so: its tokenizer manager has sockets that wait


if __name__ == "__main__":
    way, arguments, requests = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
    print(json.dumps({"engine": engine, "subprocesses": subprocesses}[way](arguments, requests)), flush=True)

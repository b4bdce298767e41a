"""``python -m gpu_like.serve FAULT_FILE TEACHER STUDENT``: a server on imitated GPU mechanisms, with its self-check."""

from __future__ import annotations

import sys
from pathlib import Path


def main(fault_file: str, teacher: str, student: str) -> int:
    from harness import SMALL
    from serving import as_argv

    from gpu_like.engines import GRAPHS, gpu_like
    from sglang_optimal import launch_server

    path = Path(fault_file)
    with gpu_like(path, path.read_text()):
        (sizes,) = GRAPHS.items()
        argv = [*as_argv({**SMALL, "mixing_self_check": "on", sizes[0]: sizes[1][0]}), *map(str, sizes[1][1:])]
        return launch_server.main(["--model-path", teacher, "--student-model-path", student, *argv])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

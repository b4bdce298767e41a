"""``python -m gpu_like.serve ARGUMENTS``: our server on imitated GPU mechanisms.

Its environment names a file with a fault, or an empty one (`faults.FILE`).
"""

from __future__ import annotations

import sys


def main(arguments: list[str]) -> int:
    from gpu_like import faults
    from gpu_like.engines import GRAPHS, gpu_like
    from sglang_optimal import launch_server

    sizes = [text for name, values in GRAPHS.items() for text in (f"--{name.replace('_', '-')}", *map(str, values))]
    with gpu_like(faults.in_force()):
        return launch_server.main([*arguments, *sizes])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The command ``sglang``, as a module."""

import sys

from sglang.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

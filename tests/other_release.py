"""``python tests/other_release.py VERSION``: the contract, and oracle identity, on another release of SGLang.

That release alone is in a virtual environment of its own; all else, torch and the kernels too, is that of the
environment that runs this. So a release that needs other versions of those is tested as far as it goes with these.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONTRACT = ("tests/test_sglang_contract.py",)
SMOKE = (
    "tests/engine/test_oracle_identity.py",
    "tests/engine/test_weight_updates.py",
    "tests/engine/test_student_adapter.py",
    "tests/server/test_http.py",
    "tests/server/test_openai.py",
)


def environment(version: str) -> Path:
    """The python of an environment with ``version`` of SGLang before this environment's packages."""
    folder = ROOT / f".venv-sglang-{version}"
    venv.create(folder, with_pip=True, clear=True)
    python = folder / "bin" / "python"
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = Path(subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True).stdout.strip())
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, f"sglang=={version}"], check=True)
    # After the installation, or pip would take this environment's SGLang for its own.
    (own / "beside.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    return python


def main(version: str) -> int:
    python = environment(version)
    ask = "import sglang, importlib.metadata as m; print(m.version('sglang'), sglang.__file__)"
    found = subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True, cwd=ROOT).stdout.split()
    if found[0] != version or f".venv-sglang-{version}" not in found[-1]:
        raise SystemExit(f"the environment has SGLang {' '.join(found)}")
    status = 0
    for tests in (CONTRACT, SMOKE):
        command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *tests]
        status |= subprocess.run(command, cwd=ROOT).returncode
    return status


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("which release? python tests/other_release.py 0.5.22")
    sys.exit(main(sys.argv[1]))

"""What must never be done with what a client or a file says."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from sglang_optimal.config import load_yaml
from sglang_optimal.distill.config import load_config

PACKAGE = Path(__file__).parents[1] / "sglang_optimal"

# Each of them runs code, or reads files that can.
MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
CALLS = {"eval", "exec", "compile", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "torch.load", "os.system"}
CALLS |= {"np.load", "numpy.load", "subprocess.getoutput"}


def dangers(source: str) -> list[str]:
    """What of the above a module uses."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            found.append(node.module)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in CALLS or any(k.arg == "shell" for k in node.keywords):
                found.append(name)
            if any(k.arg == "trust_remote_code" and getattr(k.value, "value", None) is True for k in node.keywords):
                found.append(f"{name}(trust_remote_code=True)")
    return found


def test_the_package_unpickles_and_evaluates_nothing():
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 80
    assert {str(f.relative_to(PACKAGE)): d for f in files if (d := dangers(f.read_text()))} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from dill import loads",
        "torch.load(x)",
        "yaml.load(x)",
        "eval(x)",
        "f(trust_remote_code=True)",
    ],
)
def test_it_would_be_seen(source):
    assert dangers(source)


@pytest.mark.parametrize("load", [load_yaml, load_config])
@pytest.mark.parametrize("tag", ["python/object/apply:os.mkdir [{}]", "python/name:os.system", "python/module:os"])
def test_yaml_runs_nothing(tmp_path, load, tag):
    marker = tmp_path / "made"
    file = tmp_path / "evil.yaml"
    file.write_text("mixing: !!" + tag.format(f"'{marker}'"))
    with pytest.raises(ValueError, match=r"evil\.yaml"):
        load(file)
    assert not marker.exists()

"""Tiny models shared by the whole session, and hypothesis's profiles."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from pathlib import Path

import pytest
import warm_python
from gpu_like import faults
from hypothesis import settings
from oracle import MixedOracle
from tiny_models import build_lora_adapter, build_tiny_tokenizer_model

# `make test` tries the same examples everywhere; HYPOTHESIS_PROFILE=explore looks for new ones. How long one takes says
# nothing beside other tests.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("explore", derandomize=False, deadline=None)
settings.load_profile(os.getenv("HYPOTHESIS_PROFILE", "repeatable"))

# Before any engine, and the same for all: an engine whose environment differs from the first one's imports SGLang anew.
_folder = tempfile.TemporaryDirectory(prefix="gpu-like-")
os.environ[faults.FILE] = str(Path(_folder.name) / "fault")
faults.file().touch()


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    """Beside other workers servers are forks; in the process that starts the workers, before they have their
    environment."""
    if getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput"):
        stack = contextlib.ExitStack()
        stack.enter_context(warm_python.started())
        config.add_cleanup(stack.close)


@pytest.fixture
def caplog(caplog):
    """Sees warnings whatever ran before: an engine in this process sets the root logger's level to its own."""
    caplog.set_level(logging.INFO)
    return caplog


def pytest_collection_modifyitems(items):
    """Modules that use `mixed_server` go last: an engine that shuts down kills every child process of pytest's."""
    with_server = {item.module for item in items if "mixed_server" in item.fixturenames}
    items.sort(key=lambda item: item.module in with_server)


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory):
    """Folders of two unrelated random models with the 64-token tokenizer: (teacher, student)."""
    root = tmp_path_factory.mktemp("tiny-pair")
    teacher = build_tiny_tokenizer_model(root / "teacher", seed=1)
    # Another shape, so that nothing of one model's KV cache could serve the other's, and a padded vocabulary.
    student = build_tiny_tokenizer_model(root / "student", seed=2, hidden_size=32, num_layers=1, vocab_size=80)
    return teacher, student


@pytest.fixture(scope="session")
def same_vocabulary_pair(tmp_path_factory):
    """Two unrelated models of one vocabulary size, for which SGLang's graphs have one buffer of logits."""
    root = tmp_path_factory.mktemp("same-vocabulary")
    teacher = build_tiny_tokenizer_model(root / "teacher", seed=1)
    return teacher, build_tiny_tokenizer_model(root / "student", seed=2, hidden_size=32, num_layers=1)


@pytest.fixture(scope="session")
def tiny_oracle(tiny_pair):
    return MixedOracle(*tiny_pair)


@pytest.fixture(scope="session")
def same_vocabulary_oracle(same_vocabulary_pair):
    return MixedOracle(*same_vocabulary_pair)


@pytest.fixture(scope="session")
def self_oracle(tiny_pair):
    """The oracle where the student is the teacher."""
    return MixedOracle(tiny_pair[0], tiny_pair[0])


@pytest.fixture(scope="session")
def lora_adapter(tiny_pair, tmp_path_factory):
    """A LoRA adapter of the teacher, and the oracle whose student is the teacher with it merged."""
    root = tmp_path_factory.mktemp("lora")
    build_lora_adapter(tiny_pair[0], root / "adapter", root / "merged", seed=3)
    return root / "adapter", MixedOracle(tiny_pair[0], root / "merged")


@pytest.fixture(scope="session")
def mixed_server(tiny_pair, tmp_path_factory):
    """A client of one server with both tiny models and no settings of its own, for every module that needs no other."""
    from harness import SMALL  # imports SGLang, which the tests of the mathematics do without
    from serving import as_argv, serve

    teacher, student = map(str, tiny_pair)
    argv = ["--model-path", teacher, "--student-model-path", student, *as_argv(SMALL)]
    with serve("sglang_optimal.launch_server", argv, tmp_path_factory.mktemp("server") / "log") as ready:
        yield ready


@pytest.fixture(scope="module")
def client(mixed_server):
    """The same for one module, which must leave every slot of both pools free."""
    from serving import wait_until_free

    yield mixed_server
    wait_until_free(mixed_server)

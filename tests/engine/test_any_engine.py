"""SGLang's own launches with ``SGLANG_OPTIMAL_CONFIG``: ours, the same tokens; without it, SGLang's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from harness import SMALL, check_all, random_cases
from serving import as_argv, generate, message_of, serve, server_info

from sglang_optimal.config import MixingConfig
from sglang_optimal.runtime.entrypoints import any_engine
from sglang_optimal.runtime.entrypoints.any_engine import VARIABLE, config_of_environment

ARGUMENTS = {name: value for name, value in SMALL.items() if name != "sleep_on_idle"}


def configured(pair, **mixing) -> dict[str, str]:
    return {VARIABLE: json.dumps({"student_model_path": str(pair[1]), **mixing})}


def requests_of(cases) -> list[dict]:
    return [{"input_ids": case.teacher, "sampling_params": case.params()} for case in cases]


def launched(way: str, pair, cases, environment: dict[str, str], **arguments) -> subprocess.CompletedProcess:
    """SGLang started by `launched.py`."""
    given = {"model_path": str(pair[0]), **ARGUMENTS, "log_level": "error", **arguments}
    program = Path(__file__).with_name("launched.py")
    return subprocess.run(
        [sys.executable, str(program), way, json.dumps(given), json.dumps(requests_of(cases))],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )


def answers(done: subprocess.CompletedProcess) -> list[dict]:
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_what_the_variable_holds(tmp_path, monkeypatch):
    file = tmp_path / "mixing.yaml"
    file.write_text("mixing:\n  student_model_path: S\n  kl_budget: 0.5\n")
    for value in (
        str(file),
        '{"student_model_path": "S", "kl_budget": 0.5}',
        '{"mixing": {"student_model_path": "S", "kl_budget": 0.5}}',
    ):
        monkeypatch.setenv(VARIABLE, value)
        config = config_of_environment()
        assert config.student_model_path == "S" and config.alpha.kl_budget == 0.5
    (tmp_path / "server.yaml").write_text("server:\n  port: 1\n")
    for value, message in (
        ("/no/such/file.yaml", "no such file"),
        ('{"student_model": "S"}', "unknown key 'student_model'. Did you mean 'student_model_path'"),
        ('{"student_model_path": ', "SGLANG_OPTIMAL_CONFIG: "),
        (str(tmp_path / "server.yaml"), "the section 'server' is not read here"),
    ):
        monkeypatch.setenv(VARIABLE, value)
        with pytest.raises(ValueError, match=VARIABLE) as error:
            config_of_environment()
        assert message in str(error.value)


WITHOUT = """
import sys
before = set(sys.modules)
from sglang.srt.plugins import load_plugins
from sglang.srt.plugins.hook_registry import HookRegistry
import sglang.srt.entrypoints.engine as engine
load_plugins()
ours = [
    target
    for target, hooks in HookRegistry._hooks.items()
    for _, _, source in hooks
    if source is None or source.dist_name == "sglang-optimal"
]
assert ours == [], ours
assert engine.TokenizerManager.__module__ == "sglang.srt.managers.tokenizer_manager"
print(*sorted(name for name in set(sys.modules) - before if name.startswith("sglang_optimal")))
"""


def test_without_the_variable_nothing_is_patched():
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    done = subprocess.run([sys.executable, "-c", WITHOUT], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    # The entry points of both groups, and the names that arguments may refer to.
    ours = set(done.stdout.split())
    assert ours <= {
        "sglang_optimal",
        "sglang_optimal.config",
        "sglang_optimal.names",
        "sglang_optimal.platforms",
        *(
            f"sglang_optimal.platforms.{name}"
            for name in ("cpu_attention", "cpu_kernels", "cpu_memory_pool", "torch_cpu")
        ),
        *(f"sglang_optimal.platforms.{name}" for name in ("cpu_dtype", "cpu_ranks", "packed_linear")),
        "sglang_optimal.runtime",
        "sglang_optimal.runtime.entrypoints",
        "sglang_optimal.runtime.entrypoints.any_engine",
        "sglang_optimal.runtime.plugin",
        "sglang_optimal.runtime.registry",
        "sglang_optimal.runtime.speculative",
        "sglang_optimal.runtime.speculative.spec_info",
    }, ours


def test_as_a_trainer_launches_it(tiny_pair, tiny_oracle):
    """Its own call of SGLang's processes, which no plugin was loaded for."""
    cases = random_cases(1, 5, 2)
    check_all(tiny_oracle, cases, answers(launched("subprocesses", tiny_pair, cases, configured(tiny_pair))))


@pytest.mark.slow  # so are these
@pytest.mark.parametrize("more", [{}, {"mixing_mode": "speculative"}], ids=["lockstep", "drafts"])
def test_sglang_s_engine(tiny_pair, tiny_oracle, more):
    cases = random_cases(2, 5, 2)
    check_all(tiny_oracle, cases, answers(launched("engine", tiny_pair, cases, configured(tiny_pair, **more))))


def check_server(client, oracle, seed: int) -> None:
    cases = random_cases(seed, 5, 2)
    check_all(oracle, cases, [generate(client, **request) for request in requests_of(cases)])


@pytest.mark.slow  # the same hooks as in a trainer's launch above
def test_sglang_s_server(tiny_pair, tiny_oracle, tmp_path):
    argv = ["--model-path", str(tiny_pair[0]), *as_argv(ARGUMENTS)]
    with serve("sglang.launch_server", argv, tmp_path / "log", environment=configured(tiny_pair)) as client:
        check_server(client, tiny_oracle, 3)
        assert server_info(client)["internal_states"][0]["mixing"]["student_model_path"] == str(tiny_pair[1])
        # The routes, the guard of bodies, and both sides of a chat.
        scored = client.post(
            "/score_mixture",
            json={
                "input_ids": [9, 10],
                "sampling_params": {
                    "custom_params": {
                        "student_input_ids": [11],
                        "completion_input_ids": [12, 13],
                        "return_mixing_info": True,
                    }
                },
            },
        ).json()
        assert len(scored["meta_info"]["teacher_logprob"]) == 2
        assert "student_text" in message_of(client.post("/generate", json={"text": "a", "student_text": "b"}))
        chat = {
            "model": "m",
            "messages": [{"role": "user", "content": "a b"}],
            "max_tokens": 4,
            "custom_params": {"teacher_only_messages": [{"role": "system", "content": "c"}]},
        }
        (mixing,) = client.post("/v1/chat/completions", json=chat).json()["sglext"]["mixing"]
        assert len(mixing["alpha"]) == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    "module,more",
    [
        ("sglang_command", []),
        ("sglang.launch_server", ["--dp-size", "2"]),
        ("sglang.launch_server", ["--tp-size", "2"]),
    ],
    ids=["sglang serve", "dp", "tp"],
)
def test_sglang_s_other_servers(tiny_pair, tiny_oracle, tmp_path, module, more):
    argv = ["serve"] if module == "sglang_command" else []
    argv += ["--model-path", str(tiny_pair[0]), *as_argv(ARGUMENTS), *more]
    environment = {**configured(tiny_pair), "PYTHONPATH": os.pathsep.join(sys.path)}
    with serve(module, argv, tmp_path / "log", environment=environment) as client:
        check_server(client, tiny_oracle, 4)


@pytest.mark.parametrize(
    "way,mixing,arguments,message",
    [
        ("engine", {"alpha_min": 2}, {}, "SGLANG_OPTIMAL_CONFIG: alpha_min, alpha_max: must lie in [0, 1]"),
        pytest.param(
            "engine", {}, {"dwdp_size": 2}, "--dwdp-size: only 1 is supported beside a student", marks=pytest.mark.slow
        ),
        pytest.param(
            "subprocesses", {}, {"enable_mixed_chunk": True}, "--enable-mixed-chunk: ", marks=pytest.mark.slow
        ),
        (
            "subprocesses",
            {"mixing_mode": "speculative"},
            {},
            "call sglang.srt.plugins.load_plugins() before the launch",
        ),
    ],
)
def test_what_is_refused(tiny_pair, way, mixing, arguments, message):
    done = launched(way, tiny_pair, [], configured(tiny_pair, **mixing), **arguments)
    assert done.returncode != 0 and message in done.stderr, done.stderr[-2000:]
    assert "Load weight" not in done.stderr


def test_hooks_that_cannot_be_put_end_the_process(monkeypatch, capsys):
    """SGLang logs what a plugin raises and goes on, with one model alone."""
    monkeypatch.setenv(VARIABLE, '{"student_model_path": "S"}')
    monkeypatch.setattr(any_engine, "_MANAGER", "sglang.srt.managers.tokenizer_manager.NoSuchManager")
    with pytest.raises(SystemExit) as left:
        any_engine.install()
    assert left.value.code == 2 and "NoSuchManager" in capsys.readouterr().err


def test_what_a_launch_brings_itself_is_refused(monkeypatch):
    """Its scheduler process or its tokenizer manager would not mix."""

    class Arguments:
        _sglang_optimal = MixingConfig.from_dict({"student_model_path": "S"}).resolved("T", None)

    with pytest.raises(ValueError, match="brings a scheduler process of its own"):
        any_engine._launch(None, None, Arguments(), None, print)
    with pytest.raises(ValueError, match="brings a tokenizer manager of its own, object"):
        any_engine._check_manager(None, object())

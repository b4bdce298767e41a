"""What a student cannot ride along with is refused before a model is loaded; docs/compatibility.md has it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest

from sglang_optimal import launch_server
from sglang_optimal.config import MixingConfig
from sglang_optimal.platforms.cpu_ranks import split
from sglang_optimal.runtime import launch, plugin

DOC = Path(__file__).parents[2] / "docs" / "compatibility.md"

FLAGS = {
    "--pp-size": ["2"],
    "--attn-dp-size": ["2"],
    "--attn-cp-size": ["2"],
    "--dcp-size": ["2"],
    "--dwdp-size": ["2"],
    "--enable-dp-attention": [],
    "--enable-mixed-chunk": [],
    "--enable-two-batch-overlap": [],
    "--enable-hierarchical-cache": [],
    "--enable-lmcache": [],
    "--enable-flexkv": [],
    "--enable-unified-cache-external-linker": [],
    "--enable-hisparse": [],
    "--enable-unified-memory": [],
    "--enable-lora": [],
    "--lora-paths": ["a=b"],
    "--speculative-algorithm": ["EAGLE"],
    "--speculative-draft-model-path": ["a"],
    "--speculative-num-steps": ["3"],
    "--speculative-accept-threshold-acc": ["0.9"],
    "--uno-lora-path": ["a"],
    "--enable-multi-layer-eagle": [],
    "--spec-trace-dir": ["a"],
    "--decoupled-spec-role": ["drafter"],
    "--disaggregation-mode": ["prefill"],
    "--enable-pdmux": [],
    "--enable-eplb": [],
    "--ep-dispatch-algorithm": ["static"],
    "--init-expert-location": ["a.json"],
    "--expert-distribution-recorder-mode": ["stat"],
    "--expert-balancedness-report-mode": ["server_log"],
    "--elastic-ep-backend": ["mooncake"],
    "--moe-a2a-backend": ["deepep"],
    "--moe-dense-tp-size": ["1"],
    "--enable-streaming-session": [],
    "--tokenizer-worker-num": ["2"],
    "--dllm-algorithm": ["LowConfidence"],
    "--encoder-only": [],
    "--grpc-mode": [],
    "--smg-grpc-mode": [],
    "--use-ray": [],
    "--grpc-port": ["1234"],
    "--enable-watermark": [],
    "--enable-return-routed-experts": [],
    "--enable-return-indexer-topk": [],
    "--enable-return-aux-hidden-states": [],
    "--kv-canary": ["log"],
    "--enable-linear-replayssm": [],
    "--enable-linear-replayssm-spec": [],
}
# Beside a student that is another model, or has weights of its own; with shared weights there is one model.
FLAGS_OF_TWO_MODELS = {
    "--startup-weight-load-mode": ["overlap"],
    "--checkpoint-engine-wait-weights-before-ready": [],
    "--load-format": ["remote_instance"],
    "--remote-instance-weight-loader-start-seed-via-transfer-engine": [],
    "--weight-cache-mode": ["client"],
    "--model-loader-extra-config": ['{"presharded_path": "a"}'],
    "--quantization-param-path": ["a.json"],
    "--modelopt-checkpoint-restore-path": ["a"],
    "--modelopt-checkpoint-save-path": ["a"],
    "--modelopt-export-path": ["a"],
    "--decrypted-config-file": ["a"],
    "--model-checksum": ["a.json"],
    "--kt-weight-path": ["a"],
    "--offload-group-size": ["4"],
    "--enable-layernorm-sp": [],
    "--enable-nvidia-megakernel": [],
    "--enable-amd-monokernel": [],
    "--radix-eviction-policy-config": ['{"protected_threshold": 4}'],
    "--debug-tensor-dump-output-folder": ["a"],
    "--msprobe-dump-config": ["a.json"],
}
FLAGS_OF_DRAFTING = {
    "--enable-deterministic-inference": [],
    "--enable-return-hidden-states": [],
    "--return-hidden-states-mode": ["last"],
}
FLAGS_OF_AN_ADAPTER = {"--enable-lora-overlap-loading": [], "--max-loras-per-batch": ["1"]}
ENVIRONMENT = ["SGLANG_RUST_SERVER", "SGLANG_ENABLE_POST_CAPTURE_KV_SIZING", "SGLANG_KV_CANARY_ENABLE_TOKEN_ORACLE"]
# The same flags with values that ask for nothing, or for something that goes with any student.
FINE = [
    ["--startup-weight-load-mode", "serial"],
    ["--weight-cache-mode", "off"],
    ["--load-format", "dummy"],
    ["--load-format", "presharded"],
    ["--model-loader-extra-config", '{"enable_multithread_load": true}'],
    ["--model-checksum"],
    ["--offload-group-size", "-1"],
    ["--kv-canary", "none"],
    ["--moe-a2a-backend", "none"],
    ["--init-expert-location", "trivial"],
    ["--expert-balancedness-report-mode", "off"],
    ["--decoupled-spec-role", "null"],
    ["--disaggregation-mode", "null"],
    ["--dwdp-size", "1"],
    ["--speculative-accept-threshold-acc", "1.0"],
    ["--incremental-streaming-output"],
    # Both sides get what they say about chat templates.
    ["--default-chat-template-kwargs", '{"enable_thinking": false}'],
    ["--chat-template", "a.jinja"],
    ["--hf-chat-template-name", "a"],
]


@pytest.fixture(scope="module")
def models(tiny_pair):
    return ["--model-path", str(tiny_pair[0]), "--student-model-path", str(tiny_pair[1])]


@pytest.mark.parametrize("flag", FLAGS)
def test_flags(models, flag):
    for student in (models, models[:2]):
        with pytest.raises(ValueError, match=f"^{flag}: .*beside a student"):
            launch_server.parse([*student, flag, *FLAGS[flag]])
    launch_server.parse([*models[:2], "--student-weights", "none", flag, *FLAGS[flag]])


@pytest.mark.parametrize("flag", FLAGS_OF_TWO_MODELS)
def test_flags_of_two_models(models, flag):
    for student in (models, [*models[:2], "--student-weights", "separate"]):
        with pytest.raises(ValueError, match=f"^{flag}: .*beside a student with weights of its own"):
            launch_server.parse([*student, flag, *FLAGS_OF_TWO_MODELS[flag]])
    launch_server.parse([*models[:2], flag, *FLAGS_OF_TWO_MODELS[flag]])


def test_a_gguf_file(models):
    """One file is one model."""
    with pytest.raises(ValueError, match="^--load-format: loading a GGUF file .*beside a student with weights"):
        launch_server.parse([*models, "--load-format", "gguf"])
    launch_server.parse([*models[:2], "--load-format", "gguf"])


@pytest.mark.parametrize("flag", FLAGS_OF_AN_ADAPTER)
def test_flags_of_an_adapter(models, flag):
    with pytest.raises(ValueError, match=f"^{flag}: .*beside --student-lora-path"):
        launch_server.parse([*models[:2], "--student-lora-path", "a", flag, *FLAGS_OF_AN_ADAPTER[flag]])
    launch_server.parse([*models, flag, *FLAGS_OF_AN_ADAPTER[flag]])
    launch_server.parse([*models[:2], "--student-lora-path", "a", "--max-loras-per-batch", "2"])


@pytest.mark.parametrize("argv", FINE, ids=" ".join)
def test_values_that_go_with_a_student(models, argv):
    for student in (models, models[:2], [*models, "--mixing-mode", "auto"]):
        launch_server.parse([*student, *argv])


@pytest.mark.parametrize("name", ENVIRONMENT)
def test_environment(models, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    for student in (models, models[:2]):
        with pytest.raises(ValueError, match=f"^{name}: .*beside a student; unset it"):
            launch_server.parse(student)
    launch_server.parse([*models[:2], "--student-weights", "none"])


def first_cell(line: str) -> str:
    return line.split("|")[1] if line.startswith("| ") else ""


# Their tests are elsewhere, or they are what others are refused beside.
ALSO_NAMED = {
    "--sampling-backend", "--radix-cache-backend", "--flashinfer-allreduce-fusion-backend", "--tp-size",
    "--student-lora-path",
}  # fmt: skip


def test_what_is_refused_is_tested_and_documented():
    """And is still a setting of SGLang: a field that was renamed would be refused no more."""
    from sglang.srt.environ import Envs
    from sglang.srt.server_args import ServerArgs

    fields = {refusal.field for refusal in launch._REFUSED} | {*launch._ONLY_ONE, *launch._SPECULATIVE}
    assert fields <= set(ServerArgs.__struct_fields__)
    assert {name for name, _ in launch._REFUSED_ENVIRONMENT} == set(ENVIRONMENT) <= set(vars(Envs))
    tested = FLAGS | FLAGS_OF_TWO_MODELS | FLAGS_OF_DRAFTING | FLAGS_OF_AN_ADAPTER
    assert {launch._flag(name) for name in fields} <= tested.keys()
    text = DOC.read_text()
    # One row may be of several flags.
    documented = {name for name in (*tested, *ENVIRONMENT) if f"`{name}`" in text}
    for family in ("--speculative-", "--modelopt-"):
        assert f"`{family}…`" in text
        documented |= {name for name in tested if name.startswith(family)}
    assert documented == {*tested, *ENVIRONMENT}
    section = text.split("## Refused beside a student")[1].split("\n## ")[0]
    said = {name for line in section.splitlines() for name in re.findall(r"`(--[\w-]+|SGLANG\w+)`", first_cell(line))}
    assert said - {*tested, *ENVIRONMENT} == ALSO_NAMED


@pytest.mark.parametrize("mode", ["speculative", "auto"])
@pytest.mark.parametrize("flag", FLAGS_OF_DRAFTING)
def test_flags_where_the_student_drafts(models, flag, mode):
    with pytest.raises(ValueError, match=f"^{flag}: .*where the student drafts"):
        launch_server.parse([*models, "--mixing-mode", mode, flag, *FLAGS_OF_DRAFTING[flag]])
    launch_server.parse([*models, flag, *FLAGS_OF_DRAFTING[flag]])  # not a matter of the student alone


def test_drafts_with_shared_weights(models):
    """Refused where they were asked for; ``auto`` stays in lockstep."""
    teacher = models[:2]
    with pytest.raises(ValueError, match="mixing_mode: 'speculative' gains nothing with shared weights"):
        launch_server.parse([*teacher, "--mixing-mode", "speculative"])
    assert launch_server.parse([*teacher, "--mixing-mode", "auto"])[1].longest_draft == 0


# What SGLang knows a model by, over the tiny teacher's own configuration.
MODELS = {
    "recurrent": {
        "architectures": ["Qwen3NextForCausalLM"],
        "model_type": "qwen3_next",
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "embedding or reward": {"architectures": ["LlamaForSequenceClassification"]},
    "sliding-window": {
        "architectures": ["GptOssForCausalLM"],
        "sliding_window": 64,
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
}


@pytest.mark.parametrize("side", ["--model-path", "--student-model-path"])
@pytest.mark.parametrize("kind", MODELS)
def test_models(models, tiny_pair, tmp_path, kind, side):
    number = models.index(side) + 1
    folder = tmp_path / "other"
    shutil.copytree(models[number], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **MODELS[kind]}))
    argv = [*models, "--max-total-tokens", "1000"]
    argv[number] = str(folder)
    with pytest.raises(ValueError, match=f"^{side}: .*{kind}.*not supported beside a student"):
        server_args, config = launch_server.parse(argv)
        launch.resolve(server_args, config)


@pytest.mark.parametrize(
    "more,message",
    [
        (["--mixing-mode", "speculative"], "that drafts, .*give --mixing-mode lockstep"),
        (["--mixing-mode", "auto"], "that drafts, .*give --mixing-mode lockstep"),
    ],
    ids=str,
)
def test_recurrent_layers(models, tiny_pair, tmp_path, more, message):
    """Fine in lockstep, with weights of its own or the same."""
    from recurrent_models import build_tiny_recurrent_model

    model = build_tiny_recurrent_model(tmp_path / "model", seed=1, family="qwen3.5", num_layers=2)
    argv = ["--model-path", str(model), "--max-total-tokens", "1000"]
    launch.resolve(*launch_server.parse(argv))
    argv += ["--student-model-path", str(tiny_pair[1])]
    launch.resolve(*launch_server.parse(argv))
    with pytest.raises(ValueError, match=f"^--model-path: Qwen3_5ForCausalLM is a .*recurrent layers.* {message}"):
        launch.resolve(*launch_server.parse([*argv, *more]))


def test_a_configuration_that_cannot_be_read(models, tiny_pair, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(tiny_pair[1], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "layer_types": ["full_attention"] * 7}))
    server_args, mixing = launch_server.parse([*models[:3], str(folder)])
    with pytest.raises(ValueError, match="(?s)^--student-model-path: .*layer_types"):
        launch.resolve(server_args, mixing)


@pytest.mark.parametrize("argv", [[], ["--mixing-mode", "speculative"]], ids=" ".join)
def test_a_good_pair_passes(models, argv):
    server_args, config = launch_server.parse([*models, *argv])
    launch.check_models(server_args, config)
    launch.resolve(server_args, config)


def test_shared_weights_pass(models):
    server_args, config = launch_server.parse(models[:2])
    launch.check_models(server_args, config)
    launch.resolve(server_args, config)


@pytest.mark.parametrize(
    "backend,ranks,refused", [("cutedsl", "2", True), ("cutedsl", "1", False), ("trtllm", "2", False)]
)
def test_one_workspace_of_fused_all_reduces(models, backend, ranks, refused):
    """Also refused by the worker, but after both models were loaded."""
    from sglang.srt.arg_groups.overrides import declare_resolution

    server_args, mixing = launch_server.parse([*models, "--tp-size", ranks])
    # As for some mixtures of experts on some GPUs.
    declare_resolution(server_args, "test", flashinfer_allreduce_fusion_backend=backend)
    if not refused:
        return launch.resolve(server_args, mixing)
    with pytest.raises(ValueError, match="--flashinfer-allreduce-fusion-backend: .*--enforce-disable-flashinfer"):
        launch.resolve(server_args, mixing)


def test_a_quantization_that_sglang_chose(models):
    """On some GPUs it takes the teacher's checkpoint's for the whole process, and a student without one gets it too."""
    from sglang.srt.arg_groups.overrides import declare_resolution

    server_args, config = launch_server.parse(models)
    declare_resolution(server_args, "test", quantization="fp8")
    with pytest.raises(ValueError, match="SGLang chose --quantization fp8 for the teacher"):
        launch.resolve(server_args, config)
    for argv in ([*models, "--quantization", "unquant"], models[:2]):
        server_args, config = launch_server.parse(argv)
        launch.resolve(server_args, config)


# -- Python callers --------------------------------------------------------------------------------------------------


def test_streams_that_do_not_grow(tiny_pair):
    """The streams of OptimalSampler, and of SGLang's frontend language, have all there is so far."""
    plugin.prepare()
    config = MixingConfig.from_dict({"student_model_path": str(tiny_pair[1])})
    with pytest.raises(ValueError, match="^incremental_streaming_output: a stream of OptimalSampler"):
        launch.checked_server_args(str(tiny_pair[0]), config, {"incremental_streaming_output": True}, "OptimalSampler")


# -- SGLang's version ------------------------------------------------------------------------------------------------


def pretend_installed(monkeypatch, versions: dict[str, str | None], requires: list[str] | None) -> None:
    """The metadata of packages; None: there is none."""

    def version(name: str) -> str:
        if versions.get(name) is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    def requirements(name: str) -> list[str]:
        if requires is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return requires

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.metadata, "requires", requirements)


REQUIRES = ["sglang-router==0.3.2; extra == 'dev'", "numba>=0.60", "sglang==0.5.23"]
RANGE = ["numba>=0.60", "sglang<=0.5.23,>=0.5.22"]


@pytest.mark.parametrize(
    "installed,requires",
    [
        ("0.5.23", REQUIRES),
        ("0.5.23+cu130", REQUIRES),
        ("0.5.23", ["sglang (==0.5.23)"]),
        ("0.5.23", ["sglang[all]==0.5.23"]),
        ("0.6.0", None),  # run from a folder of sources
        ("0.6.0", ["numba>=0.60"]),
        ("0.5.22", RANGE),
        ("0.5.23+cu130", RANGE),
        (None, REQUIRES),  # SGLang itself is
    ],
)
def test_the_right_sglang(monkeypatch, installed, requires):
    pretend_installed(monkeypatch, {"sglang": installed}, requires)
    launch.check_sglang_version()


@pytest.mark.parametrize("installed", ["0.5.22", "0.5.23.post1", "0.6.0"])
def test_another_sglang(monkeypatch, models, capfd, installed):
    pretend_installed(monkeypatch, {"sglang": installed}, REQUIRES)
    message = rf"sglang: {installed}, but .* sglang ==0\.5\.23 alone; run: pip install 'sglang==0\.5\.23'"
    with pytest.raises(ValueError, match=message):
        launch.checked_server_args(models[1], MixingConfig(), {}, "OptimalSampler")
    assert launch_server.main(models) == 2
    assert f"error: sglang: {installed}, but" in capfd.readouterr().err


@pytest.mark.parametrize("installed", ["0.5.21", "0.5.23.post1", "0.5.24rc1"])
def test_none_of_several(monkeypatch, installed):
    pretend_installed(monkeypatch, {"sglang": installed}, RANGE)
    with pytest.raises(ValueError, match=rf"sglang: {installed}, but .* sglang <=0\.5\.23,>=0\.5\.22 alone"):
        launch.check_sglang_version()


def test_no_sglang(monkeypatch):
    pretend_installed(monkeypatch, {}, REQUIRES)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="sglang: not installed, but .*pip install 'sglang==0.5.23'"):
        launch.check_sglang_version()


def test_our_own_pin():
    assert launch._supported_sglang().contains(importlib.metadata.version("sglang"))


def test_a_failed_registration_is_said_again(monkeypatch):
    """SGLang logs what a plugin raises and goes on; whoever registers next must hear of it, and may repair it."""
    from sglang.srt.mem_cache import registry as sglang_s

    from sglang_optimal.runtime import registry

    done: list[str] = []
    monkeypatch.setattr(registry, "_registered", set())
    monkeypatch.setattr("sglang.srt.layers.sampler.register_sampler_backend", lambda name, _: done.append("sampler"))
    monkeypatch.setattr("sglang_optimal.runtime.speculative.spec_info.register", lambda: done.append("speculation"))
    with monkeypatch.context() as broken:
        broken.delattr(sglang_s, "register_radix_cache_backend")
        for _ in range(2):
            with pytest.raises(ImportError, match="register_radix_cache_backend"):
                registry.register()

    def refuse(name, factory):
        raise ValueError("no")

    with monkeypatch.context() as refusing:
        refusing.setattr(sglang_s, "register_radix_cache_backend", refuse)
        for _ in range(2):
            with pytest.raises(ValueError, match="^no$"):
                registry.register()
    monkeypatch.setattr(sglang_s, "register_radix_cache_backend", lambda name, _: done.append("radix cache"))
    registry.register()
    registry.register()
    assert done == ["sampler", "radix cache", "speculation"]


# -- cores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cores,ranks,expected",
    [([0, 1], 2, "0|1"), ([2, 3, 4, 5], 2, "2,3|4,5"), ([0, 1, 2], 2, "0|1"), ([0, 1], 4, "0|1|0|1"), ([7], 2, "7|7")],
)
def test_cores_of_ranks(cores, ranks, expected):
    assert split(cores, ranks) == expected


def test_a_memory_saver_on_a_cpu(models, capfd):
    """SGLang's scheduler would end with a message about something else."""
    assert launch_server.main([*models, "--enable-memory-saver"]) == 2
    assert "error: --enable-memory-saver: the models are on the CPU" in capfd.readouterr().err


def test_capped_attention_on_a_cpu(models, tmp_path):
    """SGLang's attention for CPUs leaves the cap out; a model without one is fine."""
    from tiny_models import build_tiny_tokenizer_model

    model = build_tiny_tokenizer_model(tmp_path / "model", seed=1, family="gemma2", num_layers=1)
    argv = ["--model-path", str(model), "--max-total-tokens", "1000"]
    launch.resolve(*launch_server.parse(argv))
    capped = shutil.copytree(model, tmp_path / "capped")
    config = json.loads((capped / "config.json").read_text())
    (capped / "config.json").write_text(json.dumps({**config, "attn_logit_softcapping": 50.0}))
    for flags in (["--model-path", str(capped)], [*models[:2], "--student-model-path", str(capped)]):
        side = flags[-2]
        with pytest.raises(ValueError, match=rf"^{side}: Gemma2ForCausalLM caps its attention scores .*on a CPU"):
            launch.resolve(*launch_server.parse(flags))

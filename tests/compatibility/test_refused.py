"""What a student cannot ride along with is refused before a model is loaded; docs/compatibility.md has it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from sglang_optimal import launch_server
from sglang_optimal.platforms.cpu_ranks import split
from sglang_optimal.runtime import launch

DOC = Path(__file__).parents[2] / "docs" / "compatibility.md"

FLAGS = {
    "--page-size": ["16"],
    "--pp-size": ["2"],
    "--enable-dp-attention": [],
    "--enable-mixed-chunk": [],
    "--enable-two-batch-overlap": [],
    "--enable-hierarchical-cache": [],
    "--enable-lmcache": [],
    "--enable-lora": [],
    "--lora-paths": ["a=b"],
    "--speculative-algorithm": ["EAGLE"],
    "--disaggregation-mode": ["prefill"],
    "--enable-pdmux": [],
    "--enable-eplb": [],
    "--ep-dispatch-algorithm": ["static"],
    "--expert-distribution-recorder-mode": ["stat"],
    "--enable-streaming-session": [],
    "--tokenizer-worker-num": ["2"],
    "--dllm-algorithm": ["LowConfidence"],
}


@pytest.fixture(scope="module")
def models(tiny_pair):
    return ["--model-path", str(tiny_pair[0]), "--student-model-path", str(tiny_pair[1])]


@pytest.mark.parametrize("flag", FLAGS)
def test_flags(models, flag):
    with pytest.raises(ValueError, match=f"^{flag}: .*beside a student"):
        launch_server.parse([*models, flag, *FLAGS[flag]])
    assert f"`{flag}`" in DOC.read_text(), f"{flag} is not in docs/compatibility.md"


@pytest.mark.parametrize("mode", ["speculative", "auto"])
@pytest.mark.parametrize("flag", ["--enable-deterministic-inference", "--enable-return-hidden-states"])
def test_flags_where_the_student_drafts(models, flag, mode):
    with pytest.raises(ValueError, match=f"^{flag}: .*where the student drafts"):
        launch_server.parse([*models, "--mixing-mode", mode, flag])
    launch_server.parse([*models, flag])  # not a matter of the student alone


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
    "multimodal": {"architectures": ["Qwen2VLForConditionalGeneration"]},
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


def test_a_configuration_that_cannot_be_read(models, tiny_pair, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(tiny_pair[1], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "layer_types": ["full_attention"] * 7}))
    server_args, mixing = launch_server.parse([*models[:3], str(folder)])
    with pytest.raises(ValueError, match="(?s)^--student-model-path: .*layer_types"):
        launch.resolve(server_args, mixing)


def test_a_good_pair_passes(models):
    server_args, config = launch_server.parse(models)
    launch.check_models(server_args, config)
    launch.resolve(server_args, config)


@pytest.mark.parametrize(
    "cores,ranks,expected",
    [([0, 1], 2, "0|1"), ([2, 3, 4, 5], 2, "2,3|4,5"), ([0, 1, 2], 2, "0|1"), ([0, 1], 4, "0|1|0|1"), ([7], 2, "7|7")],
)
def test_cores_of_ranks(cores, ranks, expected):
    assert split(cores, ranks) == expected

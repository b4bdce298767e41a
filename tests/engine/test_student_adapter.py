"""A student that is an adapter, and other weights in its place while the server runs."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness import Case, check_greedy, check_pools, random_ids, start
from oracle import MixedOracle
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from sglang.srt.managers.io_struct import (
    ContinueGenerationReqInput,
    LoadLoRAAdapterFromTensorsReqInput,
    LoadLoRAAdapterReqInput,
    PauseGenerationReqInput,
)
from tiny_models import build_lora_adapter

OLD = "The student's old adapter is in place."


@pytest.fixture(scope="module")
def new_adapter(tiny_pair, tmp_path_factory) -> tuple[Path, MixedOracle]:
    """Another adapter of the same layers."""
    root = tmp_path_factory.mktemp("new-adapter")
    build_lora_adapter(tiny_pair[0], root / "adapter", root / "merged", seed=8)
    return root / "adapter", MixedOracle(tiny_pair[0], root / "merged")


@pytest.fixture(scope="module")
def sampler(tiny_pair, lora_adapter):
    with start((tiny_pair[0], tiny_pair[0]), student_lora_path=str(lora_adapter[0])) as engine:
        yield engine
        check_pools(engine)


@pytest.fixture(autouse=True)
def old_adapter_back(sampler, lora_adapter):
    yield
    sampler.update_student_weights(lora_adapter[0], version="old")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def cases() -> list[Case]:
    rng = random.Random(5)
    return [Case(random_ids(rng, 20), random_ids(rng, 25), 12), Case(random_ids(rng, 20), None, 12)]


def check(sampler, oracle) -> list[dict]:
    """The same prompts every time, so that the old adapter's KV would show."""
    outputs = [sampler.engine.generate(input_ids=case.teacher, sampling_params=case.params()) for case in cases()]
    for case, output in zip(cases(), outputs, strict=True):
        assert check_greedy(oracle, case, output) == 12
    return outputs


def call(sampler, coroutine):
    return sampler.engine.loop.run_until_complete(coroutine)


def load(sampler, named, config=None, **more):
    """As a trainer does over HTTP."""
    manager = sampler.engine.tokenizer_manager
    config = config or json.loads((Path(manager.mixing_config.student_lora_path) / "adapter_config.json").read_text())
    fields = {"serialized_named_tensors": [safetensors_bytes(named)], "load_format": "safetensors"}
    request = LoadLoRAAdapterFromTensorsReqInput(**{"lora_name": "student", "config_dict": config, **fields, **more})
    return call(sampler, manager.load_lora_adapter_from_tensors(request, request="over HTTP"))


@pytest.mark.parametrize("how", ["folder", "tensors", "sglang's folder", "sglang's tensors", "http"])
def test_another_adapter(sampler, lora_adapter, new_adapter, how):
    old, (folder, oracle) = lora_adapter[1], new_adapter
    check(sampler, old)
    if how == "folder":
        sampler.update_student_weights(folder, version="new")
    elif how == "tensors":
        sampler.update_student_weights(tensors(folder), version="new")
    elif how == "sglang's folder":
        assert sampler.engine.load_lora_adapter("student", str(folder)).success
    elif how == "sglang's tensors":
        config = json.loads((folder / "adapter_config.json").read_text())
        result = sampler.engine.load_lora_adapter_from_tensors("student", tensors(folder), config)
        assert result.success, result.error_message
    else:
        result = load(sampler, tensors(folder))
        assert result.success, result.error_message
    mixed, plain = check(sampler, oracle)
    if how in ("folder", "tensors"):
        assert mixed["meta_info"]["student_weight_version"] == "new"
    assert "student_weight_version" not in plain["meta_info"]


def test_again_and_again(sampler, lora_adapter, new_adapter):
    """There are places for two adapters alone, of which one is none."""
    for folder, oracle in (lora_adapter, new_adapter) * 3:
        sampler.update_student_weights(folder)
        check(sampler, oracle)


def test_another_rank(sampler, tiny_pair, lora_adapter, tmp_path):
    """Below the one that the server has room for."""
    build_lora_adapter(tiny_pair[0], tmp_path / "adapter", tmp_path / "merged", seed=9, rank=2)
    sampler.update_student_weights(tmp_path / "adapter")
    check(sampler, MixedOracle(tiny_pair[0], tmp_path / "merged"))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    result = load(sampler, tensors(lora_adapter[0]), config)  # which says 2 of tensors of 4
    assert not result.success and "has shape" in result.error_message


def test_a_plain_request_with_the_adapter(sampler, tiny_pair, new_adapter):
    """SGLang's ``lora_path`` names the student: its text alone, for the price of one model."""
    folder, oracle = new_adapter
    sampler.update_student_weights(folder)
    prompt = random_ids(random.Random(3), 20)
    params = {"temperature": 0.0, "max_new_tokens": 12, "ignore_eos": True}
    output = sampler.engine.generate(input_ids=prompt, sampling_params=params, lora_path="student")
    alone = oracle.generate_greedy(prompt, prompt, 12, alpha_method="fixed", fixed_alpha=0.0)
    assert output["output_ids"] == alone.token_ids


def _without(name: str):
    return lambda named: {key: value for key, value in named.items() if name not in key}


def _with(name: str, change):
    return lambda named: {key: change(value) if name in key else value for key, value in named.items()}


@pytest.mark.parametrize(
    "spoil, message",
    [
        (_without("layers.1.mlp.down_proj"), "layers.1.mlp.down_proj.lora_A.weight: the new adapter has no tensor"),
        (_without("v_proj"), "Failed|v_proj"),
        (lambda named: {**named, "base_model.model.model.layers.0.self_attn.z_proj.lora_A.weight": torch.ones(4, 64)},
         "layers.0.self_attn.z_proj.lora_A.weight: the student's adapter has none"),
        (_with("layers.0.self_attn.o_proj.lora_B", lambda value: value.fill_(float("nan"))),
         "o_proj.lora_B.weight: has NaN or infinity"),
        (_with("layers.0.self_attn.o_proj.lora_B", lambda value: value[:-1].clone()),
         r"o_proj.lora_B.weight: has shape \[63, 4\], but \[64, 4\]"),
        (lambda named: {}, "the new adapter has no tensor of this name"),
    ],
    ids=["missing", "missing of three", "unknown", "NaN", "shape", "nothing"],
)  # fmt: skip
def test_one_that_does_not_fit(sampler, lora_adapter, new_adapter, spoil, message):
    named = spoil(tensors(new_adapter[0]))
    with pytest.raises(ValueError, match=message) as error:
        sampler.update_student_weights(named)
    assert OLD in str(error.value)
    check(sampler, lora_adapter[1])


def test_what_is_refused(sampler, lora_adapter, new_adapter, tmp_path):
    folder = new_adapter[0]
    named = tensors(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    pickled = tmp_path / "pickled"
    shutil.copytree(folder, pickled)
    torch.save(named, pickled / "adapter_model.bin")
    (pickled / "adapter_model.safetensors").unlink()
    manager = sampler.engine.tokenizer_manager
    for result, message in (
        (sampler.engine.load_lora_adapter("other", str(folder)), "lora_name: beside --student-lora-path"),
        (sampler.engine.unload_lora_adapter("student"), "cannot be unloaded"),
        (sampler.engine.load_lora_adapter("student", str(pickled)), "no *.safetensors in"),
        (sampler.engine.load_lora_adapter("student", str(tmp_path / "none")), "no *.safetensors in"),
        (load(sampler, named, load_format=None), "load_format: send 'safetensors'"),
        (load(sampler, named, serialized_named_tensors=[b"no tensors"]), "Failed to load the adapter"),
        (load(sampler, named, serialized_named_tensors=[b"a", b"b"]), "2 for 1 ranks"),
        (load(sampler, named, {**config, "r": 64}), "rank"),
        (load(sampler, named, {"r": 4}), OLD),
    ):
        assert not result.success and message in result.error_message, result
        check(sampler, lora_adapter[1])
    assert call(
        sampler, manager.load_lora_adapter(LoadLoRAAdapterReqInput(lora_name="student", lora_path=str(folder)))
    ).success


@pytest.mark.parametrize("mode", ["running", "in_place", "retract"])
def test_requests_in_flight(sampler, lora_adapter, new_adapter, mode):
    """Running ones end first; of a paused engine, those that hold the old adapter's KV are in the way."""
    manager = sampler.engine.tokenizer_manager
    case = cases()[0]
    length = 200

    async def exchange():
        params = {**case.params(), "max_new_tokens": length}
        answer = asyncio.ensure_future(sampler.engine.async_generate(input_ids=case.teacher, sampling_params=params))
        await asyncio.sleep(0.3)
        if mode != "running":
            await manager.pause_generation(PauseGenerationReqInput(mode=mode))
        new = LoadLoRAAdapterReqInput(lora_name="student", lora_path=str(new_adapter[0]))
        result = await manager.load_lora_adapter(new)
        if mode != "running":
            await manager.continue_generation(ContinueGenerationReqInput())
        return result, await answer

    result, answer = call(sampler, exchange())
    assert result.success == (mode != "in_place"), result
    before = lora_adapter[1].generate_greedy(case.teacher, case.student, length).token_ids
    if mode == "retract":
        same = next(i for i, (a, b) in enumerate(zip(answer["output_ids"], before, strict=True)) if a != b)
        teacher, student = case.teacher + before[:same], case.student + before[:same]
        after = new_adapter[1].generate_greedy(teacher, student, length - same).token_ids
        assert 0 < same < length and answer["output_ids"][same:] == after
    else:
        assert answer["output_ids"] == before
    check(sampler, lora_adapter[1] if mode == "in_place" else new_adapter[1])


ON_TWO_RANKS = """
import json, sys
from safetensors.torch import load_file
from sglang_optimal import OptimalSampler

if __name__ == "__main__":
    model, old, new, teacher, student = map(json.loads, sys.argv[1:])
    arguments = dict(dtype="float32", tp_size=2, max_total_tokens=3000, context_length=256, mem_fraction_static=0.3)
    texts = []
    with OptimalSampler(model, student_lora_path=old, **arguments) as sampler:
        for weights in (None, load_file(new + "/adapter_model.safetensors"), old):
            if weights is not None:
                sampler.update_student_weights(weights)
            sampling = dict(max_new_tokens=12, temperature=0, ignore_eos=True)
            texts.append(sampler.generate([teacher], [student], **sampling)[0].token_ids)
    print(json.dumps(texts))
"""


@pytest.mark.slow
def test_on_two_ranks(tiny_pair, lora_adapter, new_adapter, tmp_path):
    """In a program of its own: SGLang has one configuration a process."""
    (tmp_path / "program.py").write_text(ON_TWO_RANKS)
    case = cases()[0]
    given = (str(tiny_pair[0]), str(lora_adapter[0]), str(new_adapter[0]), case.teacher, case.student)
    command = [sys.executable, str(tmp_path / "program.py"), *map(json.dumps, given)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    old, new = (
        oracle.generate_greedy(case.teacher, case.student, 12).token_ids for _, oracle in (lora_adapter, new_adapter)
    )
    assert json.loads(run.stdout.splitlines()[-1]) == [old, new, old]

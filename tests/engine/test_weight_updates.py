"""Weights in memory, as trainers send them: for the policy alone, as a whole or not at all."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from harness import Case, check_greedy, check_pools, mixing_state, random_ids, start
from oracle import MixedOracle
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from sglang.srt.managers.io_struct import CheckWeightsReqInput, UpdateWeightsFromTensorReqInput
from sglang.srt.utils import MultiprocessingSerializer
from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket
from tiny_models import build_tiny_tokenizer_model

from sglang_optimal.server_process import free_port

TENSOR = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def new_student(tmp_path_factory) -> Path:
    """A student of the same shape with other weights."""
    folder = tmp_path_factory.mktemp("new-student") / "student"
    return build_tiny_tokenizer_model(folder, seed=3, hidden_size=32, num_layers=1, vocab_size=80)


@pytest.fixture(scope="module")
def new_oracle(tiny_pair, new_student):
    return MixedOracle(tiny_pair[0], new_student)


@pytest.fixture(scope="module")
def sampler(tiny_pair):
    with start(tiny_pair) as engine:
        yield engine
        check_pools(engine)


@pytest.fixture(autouse=True)
def old_weights_back(request):
    yield
    if "sampler" in request.fixturenames:
        tiny_pair = request.getfixturevalue("tiny_pair")
        request.getfixturevalue("sampler").update_student_weights(tiny_pair[1])


def tensors(folder: Path) -> list[tuple[str, torch.Tensor]]:
    return sorted(load_file(folder / "model.safetensors").items())


def cases(seed: int) -> list[Case]:
    rng = random.Random(seed)
    return [Case(random_ids(rng, 20), random_ids(rng, 25), 12), Case(random_ids(rng, 20), None, 12)]


def check(sampler, oracle, seed: int = 1) -> list[dict]:
    """Greedy answers are the oracle's; the same prompts every time, so that a stale cache shows."""
    outputs = [sampler.engine.generate(input_ids=case.teacher, sampling_params=case.params()) for case in cases(seed)]
    for case, output in zip(cases(seed), outputs, strict=True):
        assert check_greedy(oracle, case, output) == 12
    return outputs


def checksums(sampler, selector: str = "all") -> dict[str, str]:
    manager, loop = sampler.engine.tokenizer_manager, sampler.engine.loop
    success, message, ranks, _ = loop.run_until_complete(manager.check_weights(CheckWeightsReqInput(selector=selector)))
    assert success, message
    return ranks[0]["checksums"]


def send(sampler, named, **more):
    """One part of a session, as SGLang's own engine sends it."""
    return sampler.engine.update_weights_from_tensor(named, **more)


def send_request(sampler, **fields):
    manager, loop = sampler.engine.tokenizer_manager, sampler.engine.loop
    request = UpdateWeightsFromTensorReqInput(**fields)
    return loop.run_until_complete(manager.update_weights_from_tensor(request, None))


def succeeded(result) -> None:
    assert result[0], result[1]


def test_the_policy_is_the_student(sampler, tiny_oracle, new_student, new_oracle):
    """Parts of a whole checkpoint, as SGLang's engine takes them; the teacher keeps every bit."""
    check(sampler, tiny_oracle)
    before = checksums(sampler)
    named = tensors(new_student)
    succeeded(sampler.engine.begin_weight_update())
    succeeded(send(sampler, named[:4], flush_cache=False))
    succeeded(send(sampler, named[4:]))
    succeeded(sampler.engine.end_weight_update())
    check(sampler, new_oracle)
    after = checksums(sampler)
    teacher = {name for name in before if name.startswith("teacher.")}
    assert teacher and {name: before[name] for name in teacher} == {name: after[name] for name in teacher}
    own = checksums(sampler, "target")
    assert own.keys() == before.keys() - teacher and all(
        before[name] != value for name, value in own.items() if "proj" in name
    )


@pytest.mark.parametrize("load_format", ["safetensors", "flattened_bucket"])
def test_other_formats(sampler, new_student, new_oracle, load_format):
    named = tensors(new_student)
    if load_format == "safetensors":
        payload = safetensors_bytes(dict(named))
    else:
        bucket = FlattenedTensorBucket(named_tensors=named)
        payload = MultiprocessingSerializer.serialize(
            {"flattened_tensor": bucket.get_flattened_tensor(), "metadata": bucket.get_metadata()}
        )
    succeeded(sampler.engine.begin_weight_update())
    succeeded(send_request(sampler, serialized_named_tensors=[payload], load_format=load_format))
    succeeded(sampler.engine.end_weight_update())
    check(sampler, new_oracle)


def test_some_of_the_tensors(sampler, tiny_pair, new_student, tmp_path):
    """Frozen layers need not be sent."""
    merged = {**dict(tensors(tiny_pair[1])), TENSOR: dict(tensors(new_student))[TENSOR]}
    folder = build_tiny_tokenizer_model(tmp_path / "merged", seed=3, hidden_size=32, num_layers=1, vocab_size=80)
    (folder / "model.safetensors").write_bytes(safetensors_bytes(merged, {"format": "pt"}))
    succeeded(sampler.engine.begin_weight_update())
    succeeded(send(sampler, [(TENSOR, merged[TENSOR])]))
    succeeded(sampler.engine.end_weight_update())
    check(sampler, MixedOracle(tiny_pair[0], folder))


def test_a_second_process_broadcasts(sampler, new_student, new_oracle, tiny_oracle):
    check(sampler, tiny_oracle)
    port = free_port()
    command = [sys.executable, str(Path(__file__).with_name("broadcaster.py"))]
    command += [str(new_student / "model.safetensors"), str(port), "trainer"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as trainer:
        succeeded(sampler.engine.init_weights_update_group("127.0.0.1", port, 1, 2, "trainer", backend="gloo"))
        named = tensors(new_student)
        succeeded(sampler.engine.begin_weight_update())
        succeeded(
            sampler.engine.update_weights_from_distributed(
                [name for name, _ in named],
                [str(tensor.dtype).removeprefix("torch.") for _, tensor in named],
                [list(tensor.shape) for _, tensor in named],
                group_name="trainer",
            )
        )
        succeeded(sampler.engine.end_weight_update())
        succeeded(sampler.engine.destroy_weights_update_group("trainer"))
        assert trainer.wait(60) == 0, trainer.stderr.read()
    check(sampler, new_oracle)


@pytest.mark.parametrize(
    "spoil,message",
    [
        (lambda named: [("model.layers.0.mlp.up.weight", named[0][1])], f"Did you mean '{TENSOR}'"),
        (lambda named: [(TENSOR, dict(named)[TENSOR][:-1])], f"{TENSOR}: has shape [63, 32], but [64, 32] in the stud"),
        (lambda named: [(TENSOR, dict(named)[TENSOR] * float("nan"))], f"{TENSOR}: has NaN or infinity"),
        (lambda named: [(TENSOR, "no tensor")], "Failed to update the weights"),
    ],
)
def test_a_part_that_fails_undoes_the_session(sampler, tiny_oracle, new_student, new_oracle, spoil, message):
    named = tensors(new_student)
    before = checksums(sampler)
    succeeded(sampler.engine.begin_weight_update())
    succeeded(send(sampler, named[:5]))
    success, said = send(sampler, spoil(named))
    assert not success and message in said and "The student's old weights are in place." in said
    assert checksums(sampler) == before
    check(sampler, tiny_oracle)  # requests do not wait for a session that is closed
    success, said = send(sampler, named)
    assert not success and "between begin_weight_update() and end_weight_update()" in said
    assert not sampler.engine.end_weight_update()[0]
    succeeded(sampler.engine.begin_weight_update())
    succeeded(send(sampler, named))
    succeeded(sampler.engine.end_weight_update())
    check(sampler, new_oracle)


def test_a_session_that_nobody_ends(sampler, tiny_oracle, new_student):
    """Requests wait for it; the next one begins with the weights from before."""
    succeeded(sampler.engine.begin_weight_update())
    succeeded(send(sampler, tensors(new_student)[:5]))
    answers = []
    thread = threading.Thread(target=lambda: answers.append(check(sampler, tiny_oracle)))
    thread.start()
    thread.join(1)
    assert thread.is_alive() and not answers
    succeeded(sampler.engine.begin_weight_update())
    succeeded(sampler.engine.end_weight_update())
    thread.join(30)
    assert answers


def test_what_is_refused(sampler, tiny_oracle, new_student):
    success, message = send(sampler, tensors(new_student))
    assert not success and "between begin_weight_update() and end_weight_update()" in message
    success, message = sampler.engine.begin_weight_update("draft")
    assert not success and "selector: there is no draft model" in message
    success, message = sampler.engine.update_weights_from_distributed(["a"], ["float32"], [[1]], "nobody")
    assert not success and "between begin_weight_update()" in message
    succeeded(sampler.engine.begin_weight_update())
    success, message = sampler.engine.update_weights_from_distributed(["a"], ["float32"], [[1]], "nobody")
    assert not success and "Group nobody not in" in message
    check(sampler, tiny_oracle)


def test_versions_and_spans(sampler, new_student):
    """Weights that change beneath a running request: which tokens came from which."""
    manager, loop = sampler.engine.tokenizer_manager, sampler.engine.loop
    from sglang.srt.managers.io_struct import ContinueGenerationReqInput, PauseGenerationReqInput

    case = Case(random_ids(random.Random(5), 20), random_ids(random.Random(6), 20), 400)
    answers = []
    thread = threading.Thread(
        target=lambda: answers.append(sampler.engine.generate(input_ids=case.teacher, sampling_params=case.params()))
    )
    thread.start()
    while mixing_state(sampler)["student_pool"]["requests"] == 0:
        pass
    loop.run_until_complete(manager.pause_generation(PauseGenerationReqInput(mode="in_place")))
    payload = safetensors_bytes(dict(tensors(new_student)))
    fields = {"serialized_named_tensors": [payload], "load_format": "safetensors"}
    succeeded(sampler.engine.begin_weight_update())
    success, message = send_request(sampler, **fields, weight_version="step-7")
    assert not success and "running requests hold KV of the old weights" in message
    succeeded(send_request(sampler, **fields, weight_version="step-7", flush_cache=False))
    succeeded(sampler.engine.end_weight_update())
    loop.run_until_complete(manager.continue_generation(ContinueGenerationReqInput()))
    thread.join(60)
    meta = answers[0]["meta_info"]
    old, new = meta["student_weight_versions"]
    assert (old["version"], new["version"], meta["student_weight_version"]) == ("default", "step-7", "step-7")
    assert 0 < old["end"] == new["start"] < new["end"] == 400
    assert mixing_state(sampler)["student_weight_version"] == "step-7"
    assert sampler.engine.flush_cache().success


@pytest.mark.parametrize("policy", ["teacher", pytest.param("both", marks=pytest.mark.slow)])
def test_another_policy(tiny_pair, same_vocabulary_pair, tmp_path, policy):
    """The teacher's weights change; those of a student of the same shape with them, if it is asked for."""
    pair = tiny_pair if policy == "teacher" else (tiny_pair[0], tiny_pair[0])
    new = build_tiny_tokenizer_model(tmp_path / "new", seed=9)
    with start(pair, policy=policy, student_weights="separate") as sampler:
        check(sampler, MixedOracle(*pair))
        succeeded(sampler.engine.begin_weight_update())
        succeeded(send(sampler, tensors(new)))
        succeeded(sampler.engine.end_weight_update())
        check(sampler, MixedOracle(new, pair[1] if policy == "teacher" else new))
        if policy == "teacher":
            sampler.update_student_weights(tiny_pair[1])
            state = mixing_state(sampler)
            assert state["policy"] == "teacher" and state["student_weight_version"] is None
            check(sampler, MixedOracle(new, pair[1]))


def test_one_model_in_both_places(tiny_pair, tmp_path):
    """With shared weights the policy is the model; a LoRA student is none that is updated so."""
    new = build_tiny_tokenizer_model(tmp_path / "new", seed=9)
    with start((tiny_pair[0], tiny_pair[0])) as sampler:
        check(sampler, MixedOracle(tiny_pair[0], tiny_pair[0]))
        succeeded(sampler.engine.begin_weight_update())
        succeeded(send(sampler, tensors(new)))
        assert not send(sampler, [(TENSOR, torch.zeros(1))])[0]
        check(sampler, MixedOracle(tiny_pair[0], tiny_pair[0]))
        succeeded(sampler.engine.begin_weight_update())
        succeeded(send(sampler, tensors(new)))
        succeeded(sampler.engine.end_weight_update())
        check(sampler, MixedOracle(new, new))


@pytest.mark.slow
def test_without_rollback(tiny_pair, new_student, new_oracle):
    """Nothing is kept; half new weights answer nothing."""
    with start(tiny_pair, weight_rollback="off") as sampler:
        succeeded(sampler.engine.begin_weight_update())
        succeeded(send(sampler, tensors(new_student)[:5]))
        success, message = send(sampler, [(TENSOR, torch.zeros(1))])
        assert not success and "partly new (--weight-rollback off)" in message
        with pytest.raises(ValueError, match="partly new"):
            sampler.generate("x", "x", max_new_tokens=2)
        succeeded(sampler.engine.begin_weight_update())
        succeeded(send(sampler, tensors(new_student)))
        succeeded(sampler.engine.end_weight_update())
        check(sampler, new_oracle)

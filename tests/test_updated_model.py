"""What is sent of new weights, and when the old ones are copied, without an engine."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load, save_file
from sglang.srt.managers.io_struct import UpdateWeightFromDiskReqInput

from sglang_optimal.runtime.managers.scheduler_components.weight_updater import MixedSchedulerWeightUpdaterManager
from sglang_optimal.runtime.model_executor import weight_updater
from sglang_optimal.runtime.model_executor.weight_updater import UpdatedModel, for_safetensors, tensors_request


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    monkeypatch.setattr(weight_updater, "get_parallel", lambda: SimpleNamespace(tp_size=1))


def test_tensors_that_share_memory():
    """Tied ones, and views that overlap and begin elsewhere, as the parts of a fused projection may."""
    whole = torch.arange(12.0).reshape(4, 3)
    weights = {"a": whole, "tied": whole, "part": whole[1:], "across": whole.T, "alone": torch.nn.Parameter(whole + 1)}
    separate = for_safetensors(weights)
    (payload,) = tensors_request(weights).serialized_named_tensors
    for got in (separate, load(payload)):
        assert got.keys() == weights.keys()
        for name, tensor in weights.items():
            assert torch.equal(got[name], tensor)
    assert separate["a"] is not separate["tied"] and separate["a"].data_ptr() == whole.data_ptr()
    assert len({tensor.untyped_storage().data_ptr() for tensor in separate.values()}) == len(weights)


def test_memory_on_an_accelerator_is_sent_to_each_rank_apart(monkeypatch):
    """Who sends it holds it until the reader of each payload lets go."""
    sent = []
    serializer = SimpleNamespace(serialize=lambda named: sent.append(named) or f"payload {len(sent)}".encode())
    monkeypatch.setattr(weight_updater, "MultiprocessingSerializer", serializer)
    monkeypatch.setattr(weight_updater, "get_parallel", lambda: SimpleNamespace(tp_size=2))
    request = tensors_request({"a": torch.zeros(2, device="meta")}, flush_cache=False)
    assert request.serialized_named_tensors == [b"payload 1", b"payload 2"]
    assert request.load_format is None and request.flush_cache is False


def test_a_refused_checkpoint_costs_no_copy(tmp_path):
    """Of the second model as well as of the first: nothing is loaded before both have been asked."""
    old, wrong = tmp_path / "old", tmp_path / "wrong"
    for folder, size in ((old, 2), (wrong, 3)):
        folder.mkdir()
        save_file({"weight": torch.zeros(size)}, folder / "model.safetensors")

    def runner(path):
        model = torch.nn.Module()
        model.weight = torch.nn.Parameter(torch.zeros(2))
        return SimpleNamespace(model=model, model_config=SimpleNamespace(model_path=str(path)), weight_updater=None)

    models = [UpdatedModel(side, runner(old), str(old), None, keeps=True) for side in ("teacher", "student")]
    models[0]._layout = {"weight": [3]}  # which the new checkpoint fits
    manager = MixedSchedulerWeightUpdaterManager.__new__(MixedSchedulerWeightUpdaterManager)
    success, message = manager._from_disk(models, UpdateWeightFromDiskReqInput(model_path=str(wrong)))
    assert not success and "tensor 'weight' has shape [3]" in message
    assert message.endswith("but [2] in the student. The student's old weights are in place.")
    assert all(model.whole and not model._old for model in models)

"""What decode graphs need beside another model's, without an engine; tests/gpu_like has the engines."""

from __future__ import annotations

import types

import pytest
from sglang.srt.model_executor.cuda_graph_buffer_registry import PaddingPolicy

from sglang_optimal.runtime.model_executor.graph_runners import fence_plans, prepare_graphs


class Device:
    """A stream whose work is done when somebody waits for it, or when the device gets round to it."""

    def __init__(self):
        self.queue = []

    def catch_up(self, length: int = 0) -> None:
        while len(self.queue) > length:
            self.queue.pop(0)()

    def event(self):
        return Event(self)


class Event:
    def __init__(self, device: Device):
        self._device = device
        self.waited = False

    def record(self) -> None:
        self._after = len(self._device.queue)
        self._done = False
        self._device.queue.append(self._finish)

    def _finish(self) -> None:
        self._done = True

    def synchronize(self) -> None:
        while not self._done:
            self._device.queue.pop(0)()


class FlashInferAttnBackend:
    """Plans as FlashInfer does: on the host into one buffer, from where the device copies it when its turn comes."""

    def __init__(self, device: Device):
        self.device = device
        self.pinned = None
        self.on_device = None

    def init_forward_metadata_out_graph(self, forward_batch, in_capture: bool = False) -> None:
        self.pinned = forward_batch
        self.device.queue.append(self._copy)

    def _copy(self) -> None:
        self.on_device = self.pinned


def steps(backends: list[FlashInferAttnBackend], count: int, device: Device) -> list[tuple[str, object, object]]:
    """Overlapped steps of student and teacher: (whose forward, the plan it should have, the one it had)."""
    seen = []

    def forward(backend, step):
        device.queue.append(lambda: seen.append((backend, step, backend.on_device)))

    for step in range(count):
        for backend in backends:
            backend.init_forward_metadata_out_graph(step)
            forward(backend, step)
        # The host runs one step ahead: of this step nothing has been done, of the one before the student's forward not.
        device.catch_up(4)
    device.catch_up()
    return [(step, had) for _, step, had in seen]


@pytest.mark.parametrize("fenced", [True, False])
def test_a_plan_is_copied_before_the_next_one_overwrites_it(fenced):
    device = Device()
    backends = [FlashInferAttnBackend(device) for _ in range(2)]
    if fenced:
        for backend in backends:
            fence_plans(backend, device.event)
    right = all(should == had for should, had in steps(backends, 8, device))
    assert right is fenced


def test_only_plans_of_flashinfer_are_fenced():
    device = Device()

    class Hybrid:
        prefill_backend, decode_backend = types.SimpleNamespace(), FlashInferAttnBackend(device)

    fence_plans(Hybrid(), device.event)
    Hybrid.decode_backend.init_forward_metadata_out_graph(1)
    assert len(device.queue) == 2  # the copy, and the event behind it
    other = types.SimpleNamespace(init_forward_metadata_out_graph=print)
    fence_plans(other, device.event)
    assert other.init_forward_metadata_out_graph is print


def test_graphs_that_are_captured_anew_have_the_same_room_and_padding():
    slot = types.SimpleNamespace(padding_policy=PaddingPolicy.FOREACH_COPY)
    registry = types.SimpleNamespace(get_slot=lambda name: {"input_ids": slot}[name])
    runner = types.SimpleNamespace(
        max_running_requests=8,
        req_to_token_pool=types.SimpleNamespace(size=10),
        decode_cuda_graph_runner=types.SimpleNamespace(buffer_registry=registry),
    )
    rooms = []

    def capture():
        rooms.append((runner.max_running_requests, runner.req_to_token_pool.size))
        slot.padding_policy = PaddingPolicy.FOREACH_COPY

    runner.init_decode_cuda_graph = capture
    prepare_graphs(runner, 3)
    assert slot.padding_policy is PaddingPolicy.ZERO
    runner.init_decode_cuda_graph()
    assert rooms == [(24, 30)] and slot.padding_policy is PaddingPolicy.ZERO
    assert (runner.max_running_requests, runner.req_to_token_pool.size) == (8, 10)

"""Before a request is served: both sides' logits, as the mixing sees them, against a forward of each side alone.

A wrong buffer, row table or attention plan gives text that looks well and comes from the wrong model. So random
requests go through the scheduler's own loop (prefill, decode at captured and at padded sizes, mixed and plain rows
together), and what reached the mixing is compared with what each model gives for the same tokens in a plain forward,
without graphs, cached prefixes or anybody else's rows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import time
from array import array
from collections.abc import Iterator
from typing import Any

import torch
from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
from sglang.srt.runtime_context import get_schedule
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from sglang_optimal.mixing import AlphaParams, Sides, mix
from sglang_optimal.names import SERIES
from sglang_optimal.runtime.core import PrefillChunk
from sglang_optimal.runtime.entrypoints.protocol import to_wire
from sglang_optimal.runtime.managers.schedule_batch import prefill_part
from sglang_optimal.runtime.mem_cache.guest_kv import MIN_ALIASED_PREFIX
from sglang_optimal.runtime.mem_cache.guest_states import GuestStates
from sglang_optimal.runtime.sampling.sampler import make_samplable, token_values
from sglang_optimal.runtime.sampling.sampling_observer import EqualSides
from sglang_optimal.wanted import Wanted

EXACT = 0.02
"""Largest distance of two rows of logits in float32, see `_distances`; another context or model is about 1 away."""
ROUNDED, ALONE = 0.3, 0.75
"""The same in 16 bits or fewer, where kernels of prefill and decode round differently, and a mixture of experts may now
and then choose another: of most rows, and of any."""
SERIES_TOLERANCE = 2e-3
"""Largest error of what is computed from the logits in float32."""
_STEPS = 6
_LONGEST = 24  # tokens of a prompt
_ITERATIONS = 2000


class SelfCheckError(Exception):
    """What differs, where, and what to try."""


@dataclasses.dataclass
class _Probe:
    """A request of the check.

    Attributes:
        teacher, student: what each side reads; a plain one has no student. tokens: how many to generate.
        alpha: its settings, as on the wire; None: plain.
        penalty: a frequency penalty, too small to change anything; it is not drafted for then.
        sent: SGLang's, once it has been sent.
        sides: logits that the mixing saw.
    """

    teacher: array
    student: array
    tokens: int
    alpha: dict[str, Any] | None
    penalty: float = 0.0
    sent: Req | None = None
    sides: list[tuple[torch.Tensor, torch.Tensor]] = dataclasses.field(default_factory=list)

    @property
    def req(self) -> Req:
        if self.sent is None:
            raise SelfCheckError("a request of the check was not sent")
        return self.sent

    @property
    def settings(self) -> dict[str, Any]:
        """The alpha settings of a mixed one."""
        if self.alpha is None:
            raise SelfCheckError("a plain request of the check is taken for a mixed one")
        return self.alpha

    @property
    def output_ids(self) -> array:
        """What it was answered with; a step of drafts may have drawn more."""
        return self.req.output_ids[: self.tokens]


class SelfCheck:
    """Runs on an idle scheduler, and leaves it as it was.

    Args:
        scheduler: the scheduler with its worker, graphs captured.
    """

    def __init__(self, scheduler):
        self._scheduler = scheduler
        self._worker = scheduler.tp_worker
        self._host, self._guest = self._worker.mixing_config.host, self._worker.mixing_config.guest
        self._observer = self._worker.model_runner.sampling_observer
        self._probes: dict[str, _Probe] = {}

    def run(self) -> dict[str, float | int]:
        """Returns: seconds, positions that were compared, and the largest distance of each side.

        Raises:
            SelfCheckError: a side's logits, or what was made of them, are not what they should be.
        """
        start = time.perf_counter()
        for number, probe in enumerate(self._requests()):
            self._probes[f"self-check-{number}"] = probe
        device = torch.get_device_module(self._worker.model_runner.device)
        with self._undisturbed():
            self._serve()
            self._scheduler.flush_cache()
            # What follows runs on another stream, in memory and buffers that both use.
            device.synchronize()
            with torch.no_grad():
                report = self._compare()
            device.synchronize()
        return {"seconds": round(time.perf_counter() - start, 2), **report}

    # -- requests --------------------------------------------------------------------------------------------------

    def _requests(self) -> list[_Probe]:
        """Mixed and plain ones that end one after another, so that batches of every size down to one are decoded."""
        rng = random.Random(0)
        pools = (self._worker.model_runner.token_to_kv_pool_allocator.size, self._worker.guest_kv.size)
        # All of them must fit at once: one that is put back would be compared at the wrong positions.
        longest = min(_LONGEST, self._worker.model_config.context_len // 4, self._worker.guest_context_len // 4)
        longest = min(longest, min(pools) // 32)

        def ids(length: int | None = None) -> array:
            length = length or rng.randint(2, max(longest, 2))
            return array("q", [rng.randrange(self._worker.support.size) for _ in range(length)])

        middle = {"alpha_method": "kl_symmetry", "alpha_min": 0.0, "alpha_max": 1.0, "fixed_alpha": None}
        ends = [{**middle, "alpha_method": "fixed", "fixed_alpha": alpha} for alpha in (0.0, 1.0)]
        # Of every kind one that ends late, so that each is decoded beside the others.
        alphas = [(middle, 0.0), (middle, 1e-6), (None, 0.0), (ends[0], 0.0), (ends[1], 0.0), (None, 0.0)]
        probes = [_Probe(ids(), ids(), _STEPS - i, alpha, penalty) for i, (alpha, penalty) in enumerate(alphas)]
        # What both contexts begin with is computed once where weights are shared, and the guest's prefill comes last.
        if longest >= _LONGEST:
            common = ids(MIN_ALIASED_PREFIX + 4)
            probes.append(_Probe(common + ids(3), common + ids(5), 2, middle))
        return probes

    def _message(self, rid: str, probe: _Probe) -> TokenizedGenerateReqInput:
        custom = None
        if probe.alpha is not None:
            custom = to_wire(
                {"return_mixing_info": list(SERIES), **probe.alpha},
                getattr(probe, self._guest),
                self._worker.mixing_config,
            )
        params = SamplingParams(
            temperature=0.0,
            max_new_tokens=probe.tokens,
            ignore_eos=True,
            frequency_penalty=probe.penalty,
            custom_params=custom,
        )
        params.normalize(None)
        return TokenizedGenerateReqInput(
            rid=rid, input_text="", input_ids=getattr(probe, self._host), input_embeds=None, mm_inputs=None,
            token_type_ids=None, sampling_params=params, return_logprob=False, logprob_start_len=-1, top_logprobs_num=0,
            token_ids_logprob=None, stream=False,
        )  # fmt: skip

    # -- the run ---------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        """Run the scheduler's loop on the requests until all have ended."""
        scheduler, waiting, iterations = self._scheduler, dict(self._probes), 0

        def ingest(stop_at_pause: bool = False) -> list:
            nonlocal iterations
            iterations += 1
            if waiting:
                scheduler.process_input_requests([self._message(rid, probe) for rid, probe in waiting.items()])
                waiting.clear()
            elif iterations > _ITERATIONS:
                raise SelfCheckError(f"the requests of the check have not ended after {_ITERATIONS} steps.")
            scheduler.gracefully_exit = iterations > 1 and scheduler.is_fully_idle()
            return []

        scheduler.ingest_requests = ingest
        try:
            Scheduler.run_event_loop(scheduler)
        except SelfCheckError:
            raise
        except Exception as error:
            raise SelfCheckError(f"a step failed: {type(error).__name__}: {error}") from error
        finally:
            scheduler.gracefully_exit = False
            del scheduler.ingest_requests

    @contextlib.contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Outputs go nowhere, nothing is counted, and what reaches the mixing is kept."""
        scheduler, observer = self._scheduler, self._observer
        on_created = scheduler.on_created

        def created(req: Req) -> None:
            on_created(req)
            self._probes[req.rid].sent = req

        senders = (scheduler.ipc_channels.send_to_tokenizer, scheduler.ipc_channels.send_to_detokenizer)
        sockets = [sender.socket for sender in senders]
        metrics, on_tokens, equal_sides = scheduler.mixing_metrics, observer.on_tokens, observer.equal_sides
        observer.equal_sides = EqualSides()
        for sender in senders:
            sender.socket = None
        scheduler.mixing_metrics = observer.on_tokens = None
        scheduler.on_created, observer.on_sides = created, self._see
        try:
            with self._drafting():
                yield
        finally:
            del scheduler.on_created
            observer.on_sides = None
            scheduler.mixing_metrics, observer.on_tokens = metrics, on_tokens
            for sender, socket in zip(senders, sockets, strict=True):
                sender.socket = socket
            kv = self._worker.guest_kv
            kv.prompt_tokens = kv.cached_tokens = 0
            observer.equal_sides = equal_sides

    @contextlib.contextmanager
    def _drafting(self) -> Iterator[None]:
        """Where the guest may draft it does, as far as it may; nothing is learnt from that."""
        worker = self._scheduler.draft_worker
        if worker is None:
            yield
            return
        with worker.always_drafting():
            yield

    def _see(self, reqs: list[Req], teacher: torch.Tensor, student: torch.Tensor) -> None:
        """Keep both sides' logits [n, V] of the next position of each request."""
        for req, t, s in zip(reqs, teacher.float(), student.float(), strict=True):
            self._probes[req.rid].sides.append((t.clone(), s.clone()))

    # -- comparison ------------------------------------------------------------------------------------------------

    def _compare(self) -> dict[str, float | int]:
        for probe in self._probes.values():
            reason = getattr(probe.req.finished_reason, "message", None)
            if reason or len(probe.output_ids) < probe.tokens:
                raise SelfCheckError(f"a request of the check ended after {len(probe.output_ids)} tokens: {reason}")
        mixed = [probe for probe in self._probes.values() if probe.alpha is not None]
        report: dict[str, float | int] = {"positions": sum(probe.tokens for probe in self._probes.values())}
        for side in ("teacher", "student"):
            report[f"{side}_distance"] = round(self._check_side(side, mixed), 4)
        for probe in self._probes.values():
            if probe.alpha is None:
                self._check_plain(probe, self._alone(probe, self._host))
            else:
                self._check_series(probe)
        return report

    def _check_side(self, side: str, probes: list[_Probe]) -> float:
        """Compare the logits of one side at every position of some requests; returns the largest distance."""
        expected = [self._alone(probe, side) for probe in probes]
        seen = [torch.stack([pair[side == "student"] for pair in probe.sides[: probe.tokens]]) for probe in probes]
        expected = [self._worker.support.cut(logits) for logits in expected]
        width = min(seen[0].shape[-1], expected[0].shape[-1])
        distances = _distances(torch.cat(seen)[:, :width], torch.cat(expected)[:, :width])
        rows = distances.split([probe.tokens for probe in probes])
        # The first position comes of a prefill, the others of decode steps.
        self._check_rows(side, "prefill", torch.cat([own[:1] for own in rows]))
        for own in rows:
            self._check_rows(side, "decode", own[1:])
        return float(distances.max())

    def _check_rows(self, side: str, step: str, distances: torch.Tensor) -> None:
        runners = (self._runner("teacher"), self._runner("student"))
        exact = all(torch.float32 == runner.dtype == runner.kv_cache_dtype for runner in runners)
        most, any_row = (EXACT, EXACT) if exact else (ROUNDED, ALONE)
        if len(distances) == 0 or (bool((distances <= any_row).all()) and bool(distances.median() <= most)):
            return
        raise SelfCheckError(
            f"the {side}'s logits are wrong after a {step} step: {float(distances.median()):.3f} away from those of "
            f"the {side} alone, {float(distances.max()):.3f} at most, where {most} is allowed. "
            f"{self._advice(side, step)}"
        )

    def _check_plain(self, probe: _Probe, expected: torch.Tensor) -> None:
        """The tokens of a plain request must be (about) the most likely ones of the host alone."""
        ids = torch.tensor(list(probe.output_ids), device=expected.device).unsqueeze(-1)
        below = (expected.amax(-1) - expected.gather(-1, ids).squeeze(-1)) / expected.std(-1).clamp(min=1e-9)
        wrong = below > 6.0 * ROUNDED
        if bool(wrong.any()):
            step = "prefill" if bool(wrong[0]) else "decode"
            raise SelfCheckError(
                f"a plain request beside mixed ones got a token that the {self._host} alone finds unlikely, after a "
                f"{step} step. {self._advice(self._host, step)}"
            )

    def _check_series(self, probe: _Probe) -> None:
        """Alpha, the log-probabilities and the divergences must be those of the logits that were mixed."""
        n, v = probe.tokens, self._worker.support.size
        teacher, student = (torch.stack([pair[i][:v] for pair in probe.sides[:n]]) for i in (0, 1))
        alpha = AlphaParams.uniform(
            n, probe.settings["alpha_method"], fixed_alpha=probe.settings["fixed_alpha"] or 0.0, device=teacher.device
        )
        temperature = torch.ones(n, device=teacher.device)
        mixture = mix(teacher, student, temperature, alpha, ess_ratio=True, implementation="torch")
        make_samplable(mixture.logits, mixture)
        ids = torch.tensor(list(probe.output_ids), device=teacher.device)
        expected = token_values(Sides(mixture, teacher, student, temperature), ids, Wanted()).cpu()
        seen = torch.tensor([probe.req.customized_info[name][:n] for name in SERIES]).T
        error = (seen - expected).abs() / expected.abs().clamp(min=1.0)
        # Where the sides hardly differ any alpha will do, and the ratio of sample sizes may be too large for float32.
        alike = expected[:, SERIES.index("kl_to_student")] + expected[:, SERIES.index("kl_to_teacher")] < 1e-4
        error[alike, SERIES.index("alpha")] = 0.0
        for name, value in zip(SERIES, error.amax(0).tolist(), strict=True):
            if not value <= SERIES_TOLERANCE and name != "ess_ratio":
                raise SelfCheckError(
                    f"{name} is off by {value:.2g} for the logits that were mixed: the mixing kernel is wrong on this "
                    "device. Report it; --student-weights none serves without mixing."
                )
        values = dict(zip(SERIES, seen.T, strict=True))
        fixed = probe.settings["fixed_alpha"]
        if fixed is not None:
            side = "teacher" if fixed == 1.0 else "student"
            gap = (values["mixture_logprob"] - values[f"{side}_logprob"]).abs().max()
            if not gap <= SERIES_TOLERANCE:
                raise SelfCheckError(f"alpha {fixed:g} does not give the {side} back: off by {float(gap):.2g} nats.")

    def _advice(self, side: str, step: str) -> str:
        runner = self._runner(side)
        backend = runner.prefill_attention_backend_str if step == "prefill" else runner.decode_attention_backend_str
        graphs = runner.prefill_cuda_graph_runner if step == "prefill" else runner.decode_cuda_graph_runner
        with_graphs = graphs is not None and graphs is not runner.eager_runner
        flag = "--disable-prefill-cuda-graph" if step == "prefill" else "--disable-cuda-graph"
        tries = ([flag] if with_graphs else []) + [
            f"--attention-backend {name}" for name in ("triton", "fa3", "flashinfer") if name != backend
        ]
        return (
            f"Attention backend: {backend}; graphs: {'on' if with_graphs else 'off'}. Try {', or '.join(tries)}. "
            "--mixing-self-check off starts all the same."
        )

    # -- each side alone -------------------------------------------------------------------------------------------

    def _alone(self, probe: _Probe, side: str) -> torch.Tensor:
        """Logits [tokens, V] of one side for each token of a request, from prefills of the whole context."""
        prompt = probe.teacher if side == "teacher" else probe.student
        contexts = [prompt + probe.output_ids[:i] for i in range(probe.tokens)]
        limit = min(x for x in (get_schedule().chunked_prefill_size, 4096) if x and x > 0)
        rows: list[torch.Tensor] = []
        while contexts:
            piece = [contexts.pop(0)]
            while contexts and sum(map(len, piece)) + len(contexts[0]) <= limit and len(piece) < self._most_rows:
                piece.append(contexts.pop(0))
            rows.append(self._prefill(probe.req, piece, side))
        return torch.cat(rows)

    @property
    def _most_rows(self) -> int:
        return min(8, self._worker.model_runner.req_to_token_pool.size - 1)

    def _prefill(self, req: Req, contexts: list[array], side: str) -> torch.Tensor:
        """Logits [n, V] of the last token of each context, by one eager forward into slots of their own."""
        runner, kv = self._runner(side), self._worker.guest_kv
        table, allocator, offset = runner.req_to_token_pool.req_to_token, runner.token_to_kv_pool_allocator, 0
        if side == self._guest:
            req, offset = kv.as_guest(req), kv.req_pool_offset
        slots = allocator.alloc(sum(kv.ceil_paged_tokens(len(ids)) for ids in contexts))
        chunks, start, states = [], 0, GuestStates.of(runner.req_to_token_pool)
        for row, ids in enumerate(contexts, 1):
            state = None
            if states is not None:
                state = states.alloc(self._scheduler.tree_cache)
                states.bind(row + offset, state)
            own = slots[start : start + len(ids)]
            table[row + offset, : len(ids)] = own.to(table.dtype)
            chunks.append(PrefillChunk(req, row, ids, 0, len(ids), own, True, state))
            start += kv.ceil_paged_tokens(len(ids))
        graphs, runner.prefill_cuda_graph_runner = runner.prefill_cuda_graph_runner, None
        try:
            part = prefill_part(self._idle_batch(), chunks, offset)
            forward_batch = ForwardBatch.init_new(part, runner, return_hidden_states_before_norm=False)
            return runner.forward(forward_batch).logits_output.next_token_logits.float().clone()
        finally:
            runner.prefill_cuda_graph_runner = graphs
            allocator.free(slots)
            for chunk in chunks:
                if states is not None and chunk.recurrent is not None:
                    states.free(chunk.recurrent)

    def _runner(self, side: str):
        return self._worker.model_runner if side == self._host else self._worker.guest_runner

    def _idle_batch(self) -> ScheduleBatch:
        scheduler = self._scheduler
        batch = ScheduleBatch.init_new(
            [], scheduler.req_to_token_pool, scheduler.token_to_kv_pool_allocator, scheduler.tree_cache,
            scheduler.model_config, False, SpeculativeAlgorithm.NONE,
        )  # fmt: skip
        batch.forward_mode = ForwardMode.EXTEND
        return batch


def _distances(seen: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """[n] how far rows of logits [n, V] are apart, as a share of what distinguishes the expected ones from each other;
    NaN where they are not finite.

    A constant added to a row changes no probability, and a model prefers some tokens whatever it has read.
    """
    seen, expected = (logits - logits.mean(-1, keepdim=True) for logits in (seen.double(), expected.double()))
    own = (expected - expected.mean(0)).norm(dim=-1)
    return (seen - expected).norm(dim=-1) / torch.maximum(own, 0.1 * expected.norm(dim=-1)).clamp(min=1e-12)

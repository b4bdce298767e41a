"""The nested design: stock SGLang with the teacher, whose logits processor asks a second stock SGLang for the student.

At every step the processor sends one batched request with each row's student context so far, and gets the 20 most
likely tokens with their log-probabilities; every other token has probability 0. In SGLang's sources (0.5.23):

- ``Req._compute_max_prefix_len`` bounds the prefix taken from the radix cache by ``logprob_start_len``, so that
  ``logprob_start_len=0`` makes the student compute its whole prompt anew for every token, as vLLM does for a processor
  that asks for ``prompt_logprobs``. SGLang then also returns the 20 most likely tokens of every prompt position.
- ``Scheduler.event_loop_overlap`` samples a token before the last one is in ``req.output_ids``; so the teacher needs
  ``disable_overlap_schedule``.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence
from typing import Any, ClassVar

import orjson
import requests
import torch
from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor
from torch import Tensor

from bench.peers import bisect_alpha
from sglang_optimal.server_process import free_port

TOP = 20
"""Log-probabilities that the student's server returns a row."""

_START_TIMEOUT = 1800  # seconds, for the student's server


def truncated_mixture(teacher_logits: Tensor, top_ids: Tensor, top_logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """The mixture of the teacher and the student's most likely tokens.

    Args:
        teacher_logits: [B, V]. top_ids: [B, TOP] int64. top_logprobs: [B, TOP], the student's, as given.

    Returns:
        (log q [B, V] float32, −inf outside ``top_ids``; alpha [B, 1]).
    """
    log_t = torch.log_softmax(teacher_logits.float(), dim=-1).gather(-1, top_ids)
    log_s = top_logprobs.float()
    alpha = bisect_alpha(log_t, log_s)
    log_q = torch.log_softmax(torch.lerp(log_s, log_t, alpha), dim=-1)
    full = torch.full(teacher_logits.shape, -torch.inf, device=teacher_logits.device)
    return full.scatter_(-1, top_ids, log_q), alpha


class NestedMixture(CustomLogitProcessor):
    """Runs in the teacher's scheduler process. Reads ``custom_params``: student_url, student_input_ids, recompute."""

    http: ClassVar[requests.Session | None] = None  # SGLang makes a new instance for every prefill

    def __call__(self, logits: Tensor, custom_param_list: list[dict[str, Any]] | None = None) -> Tensor:
        rows = custom_param_list or []
        contexts = [[*row["student_input_ids"], *row["__req__"].output_ids] for row in rows]
        ids, logprobs = self.ask_student(rows[0]["student_url"], contexts, rows[0]["recompute"])
        log_q, _ = truncated_mixture(
            logits, torch.tensor(ids, device=logits.device), torch.tensor(logprobs, device=logits.device)
        )
        return log_q

    @classmethod
    def ask_student(
        cls, url: str, contexts: list[list[int]], recompute: bool
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Ids and log-probabilities of the student's next tokens, TOP each, of all contexts in one request."""
        if cls.http is None:
            cls.http = requests.Session()
            cls.http.trust_env = False  # no look for proxies and passwords at every step
        body = {
            "input_ids": contexts,
            "sampling_params": {"max_new_tokens": 1, "temperature": 0},
            "return_logprob": True,
            "top_logprobs_num": TOP,
            "logprob_start_len": 0 if recompute else -1,
        }
        response = cls.http.post(
            f"{url}/generate", data=orjson.dumps(body), headers={"Content-Type": "application/json"}
        )
        response.raise_for_status()
        tops = [output["meta_info"]["output_top_logprobs"][0] for output in orjson.loads(response.content)]
        return [[entry[1] for entry in top] for top in tops], [[entry[0] for entry in top] for top in tops]


class NestedSampler:
    """Both servers. Start it after the process's other engines: SGLang's settings are the last engine's for all.

    Args:
        teacher, student: Hugging Face id or folder.
        **server_args: SGLang's ServerArgs, for both.
    """

    def __init__(self, teacher: str, student: str, **server_args: Any):
        import sglang

        self.engine = None
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        # Token ids in and out: without a tokenizer SGLang spares each answer the way through the detokenizer.
        arguments = {
            **server_args,
            "model_path": student,
            "host": "127.0.0.1",
            "port": port,
            "skip_tokenizer_init": True,
        }
        # Not a `ServerProcess`: the arguments are Python values, as `sglang.Engine` takes them.
        self.server = multiprocessing.get_context("spawn").Process(target=serve, args=(arguments,))
        self.server.start()
        try:
            wait_until_ready(self.server, self.url)
            self.engine = sglang.Engine(
                model_path=teacher,
                enable_custom_logit_processor=True,
                disable_overlap_schedule=True,
                **server_args,
            )
        except BaseException:
            self.shutdown()
            raise

    def generate(
        self,
        teacher_ids: Sequence[Sequence[int]],
        student_ids: Sequence[Sequence[int]],
        max_new_tokens: int,
        temperature: float = 1.0,
        recompute: bool = False,
    ) -> list[list[int]]:
        """New tokens of every row, ``max_new_tokens`` each: nothing ends a row early.

        Args:
            teacher_ids, student_ids: the prompts, one of each for a row.
            temperature: 1, or 0 for greedy: SGLang divides the processor's log q* by any other.
            recompute: whether the student computes its whole context at every step, else its radix cache has it.
        """
        params = [
            {
                "temperature": temperature,
                "max_new_tokens": max_new_tokens,
                "ignore_eos": True,
                "custom_params": {"student_url": self.url, "student_input_ids": list(ids), "recompute": recompute},
            }
            for ids in student_ids
        ]
        outputs = self.engine.generate(
            input_ids=[list(ids) for ids in teacher_ids],
            sampling_params=params,
            custom_logit_processor=NestedMixture.to_str(),
        )
        return [list(output["output_ids"]) for output in outputs]

    def flush_cache(self) -> None:
        """Empty both radix caches.

        Raises:
            RuntimeError: a server is busy.
        """
        response = requests.post(f"{self.url}/flush_cache", timeout=60)
        if not response.ok or not self.engine.flush_cache().success:
            raise RuntimeError("the caches could not be flushed.")

    def shutdown(self) -> None:
        """Stop both servers."""
        from sglang.srt.utils import kill_process_tree

        if self.server.is_alive():
            kill_process_tree(self.server.pid)
        self.server.join()
        if self.engine is not None:
            self.engine.shutdown()


def wait_until_ready(server: Any, url: str) -> None:
    """Wait until the server in the process ``server`` answers.

    Raises:
        RuntimeError: it ended.
        TimeoutError: it does not answer in time.
    """
    deadline = time.monotonic() + _START_TIMEOUT
    while time.monotonic() < deadline:
        if not server.is_alive():
            raise RuntimeError(f"the second server ended with status {server.exitcode}.")
        try:
            if requests.get(f"{url}/health", timeout=30).ok:
                return
        except requests.RequestException:
            pass
        time.sleep(0.5)
    raise TimeoutError(f"the second server was not ready after {_START_TIMEOUT} s.")


def serve(arguments: dict[str, Any]) -> None:
    """Stock SGLang's HTTP server, in a process of its own."""
    from sglang.srt.entrypoints.http_server import launch_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import ServerArgs

    load_plugins()
    launch_server(ServerArgs(**arguments))

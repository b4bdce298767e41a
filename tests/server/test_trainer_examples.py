"""The examples for slime and verl, against a server of ours; the trainers themselves are stood in for.

Neither is on the machines that run the tests. The stand-ins have the members that the examples use, with the signatures
that docs/trainers.md names the versions of.
"""

from __future__ import annotations

import asyncio
import enum
import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest

TEACHER = [9, 10, 11, 12]
STUDENT = [20, 21]


class Tokenizer:
    def encode(self, text, add_special_tokens):
        assert add_special_tokens is False
        return {"the teacher's": TEACHER, "the student's": STUDENT}[text]

    def apply_chat_template(self, messages, add_generation_prompt, return_dict):
        assert add_generation_prompt and not return_dict
        return {"the teacher's": TEACHER, "the student's": STUDENT}[messages[0]["content"]]


@pytest.fixture
def modules(monkeypatch):
    """Puts stand-in modules where an import finds them."""

    def put(**members: dict) -> None:
        for name, found in members.items():
            parts = name.split("__")
            for i in range(1, len(parts) + 1):
                monkeypatch.setitem(sys.modules, ".".join(parts[:i]), ModuleType(".".join(parts[:i])))
            vars(sys.modules[".".join(parts)]).update(found)

    return put


class Sample:
    class Status(enum.Enum):
        PENDING = "pending"
        TRUNCATED = "truncated"

    def __init__(self, **fields):
        self.status, self.tokens, self.response, self.response_length = Sample.Status.PENDING, [], "", 0
        self.rollout_log_probs, self.loss_mask, self.metadata = [], [], {}
        vars(self).update(fields)

    def append_response_tokens(self, args, *, tokens, log_probs, trainable, meta_info, text):
        assert trainable and meta_info["finish_reason"]
        self.tokens = self.tokens + tokens
        self.rollout_log_probs += log_probs
        self.response += text
        self.response_length += len(tokens)


@pytest.fixture
def slime(modules, mixed_server, monkeypatch):
    async def post(url, payload):
        assert url == "http://router:30000/generate"
        response = await asyncio.to_thread(mixed_server.post, "/generate", json=payload)
        assert response.status_code == 200, response.text
        return response.json()

    modules(
        slime__rollout__sglang_rollout={"GenerateState": lambda args: SimpleNamespace(tokenizer=Tokenizer())},
        slime__utils__http_utils={"post": post},
        slime__utils__types={"Sample": Sample},
    )
    monkeypatch.delitem(sys.modules, "frontend.trainers.slime_mixture", raising=False)
    return importlib.import_module("frontend.trainers.slime_mixture")


ARGS = SimpleNamespace(sglang_router_ip="router", sglang_router_port=30000)
GREEDY = {"temperature": 0.0, "max_new_tokens": 6, "ignore_eos": True}


@pytest.mark.parametrize("teacher", ["the teacher's", [{"role": "user", "content": "the teacher's"}]])
def test_slime(slime, tiny_oracle, teacher):
    """Also where a rollout goes on that was interrupted."""
    expected = tiny_oracle.generate_greedy(TEACHER, STUDENT, 6, fixed_alpha=0.3, alpha_method="fixed")
    metadata = {"teacher_prompt": teacher, "mixing": {"fixed_alpha": 0.3}}
    sample = Sample(prompt="the student's", metadata=metadata)
    asyncio.run(slime.generate(ARGS, sample, {**GREEDY, "max_new_tokens": 2}))
    assert sample.tokens == STUDENT + expected.token_ids[:2]
    asyncio.run(slime.generate(ARGS, sample, dict(GREEDY)))
    assert sample.tokens == STUDENT + expected.token_ids
    assert sample.rollout_log_probs == pytest.approx(expected.mixture_logprobs, abs=1e-3)
    asyncio.run(slime.generate(ARGS, sample, dict(GREEDY)))
    assert sample.status is Sample.Status.TRUNCATED and sample.response_length == 6
    with pytest.raises(ValueError, match="metadata: has no teacher_prompt"):
        asyncio.run(slime.generate(ARGS, Sample(prompt="the student's"), dict(GREEDY)))


def test_verl(modules, mixed_server, tiny_oracle, monkeypatch):
    registered = {}

    class AgentLoopBase:
        def __init__(self, server_manager, tokenizer):
            rollout = SimpleNamespace(response_length=4)
            self.config = SimpleNamespace(actor_rollout_ref=SimpleNamespace(rollout=rollout))
            self.server_manager, self.tokenizer = server_manager, tokenizer
            self.loop = asyncio.get_event_loop()

    def register(name):
        return lambda cls: registered.setdefault(name, cls)

    modules(
        verl__experimental__agent_loop__agent_loop={
            "AgentLoopBase": AgentLoopBase, "AgentLoopOutput": SimpleNamespace, "register": register,
        }
    )  # fmt: skip
    monkeypatch.delitem(sys.modules, "frontend.trainers.verl_mixture", raising=False)
    importlib.import_module("frontend.trainers.verl_mixture")

    class Server:
        """verl's: the sampling parameters go to SGLang's request as they are."""

        async def generate(self, request_id, *, prompt_ids, sampling_params):
            body = {"rid": request_id, "input_ids": prompt_ids, "sampling_params": sampling_params}
            response = await asyncio.to_thread(mixed_server.post, "/generate", json={**body, "return_logprob": True})
            drawn = response.json()["meta_info"]["output_token_logprobs"]
            return SimpleNamespace(token_ids=[item[1] for item in drawn], log_probs=[item[0] for item in drawn])

    async def run(extra):
        loop = registered["mixture_agent"](Server(), Tokenizer())
        raw = [{"role": "user", "content": "the student's"}]
        return await loop.run(dict(GREEDY), raw_prompt=raw, extra_info=extra)

    expected = tiny_oracle.generate_greedy(TEACHER, STUDENT, 4)
    output = asyncio.run(run({"teacher_prompt": [{"role": "user", "content": "the teacher's"}]}))
    assert output.prompt_ids == STUDENT and output.response_ids == expected.token_ids
    assert output.response_mask == [1] * 4
    assert output.response_logprobs == pytest.approx(expected.mixture_logprobs, abs=1e-3)
    with pytest.raises(ValueError, match="extra_info: has no teacher_prompt"):
        asyncio.run(run({}))

"""Models that see images, mixed on text: greedy output is the oracle's; images are for plain requests alone."""

from __future__ import annotations

import asyncio
import base64
import io
import random

import pytest
from harness import Case, check_all, check_pools, mixing_state, random_cases, random_ids, run, start
from oracle import MixedOracle
from PIL import Image
from recurrent_models import ENVIRONMENT
from serving import as_argv, serve, wait_until_free
from tiny_models import build_tiny_tokenizer_model
from vision_models import FAMILIES, build_tiny_vision_model

TIGHT = {"chunked_prefill_size": 16, "max_total_tokens": 480, "schedule_conservativeness": 0.05}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("vision")


@pytest.fixture(scope="module")
def qwen(folder):
    return build_tiny_vision_model(folder / "qwen", seed=61, family="qwen2.5-vl")


@pytest.fixture(scope="module")
def llama(folder):
    return build_tiny_tokenizer_model(folder / "llama", seed=63, hidden_size=32, num_layers=1, vocab_size=72)


def check_text(sampler, oracle) -> None:
    for seed in (51, 52):
        cases = random_cases(seed, 6, 2)
        check_all(oracle, cases, run(sampler, cases))
        check_all(oracle, cases, run(sampler, cases))  # from the radix caches
        check_pools(sampler)


@pytest.mark.slow  # an engine for each family
@pytest.mark.parametrize("family", FAMILIES)
def test_two_models(folder, family, monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    pair = [
        build_tiny_vision_model(folder / f"{family}-{seed}", seed=seed, family=family, num_layers=layers)
        for seed, layers in ((64, 2), (65, 1))
    ]
    with start(pair, **TIGHT, mixing_self_check="on") as sampler:
        check_text(sampler, MixedOracle(*pair))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_shared_weights(folder, family, monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    model = build_tiny_vision_model(folder / f"{family}-shared", seed=66, family=family)
    with start((model, model), mixing_self_check="on") as sampler:
        assert mixing_state(sampler)["shared_weights"] and mixing_state(sampler)["self_check"]
        check_text(sampler, MixedOracle(model, model))


@pytest.mark.slow
@pytest.mark.parametrize("order", ["teacher", "student"])
def test_beside_a_model_of_text(qwen, llama, order):
    pair = (qwen, llama) if order == "teacher" else (llama, qwen)
    with start(pair, **TIGHT) as sampler:
        check_text(sampler, MixedOracle(*pair, of_one=range(64, 68)))


def image(seed: int) -> str:
    noise = random.Random(seed).randbytes(56 * 56 * 3)
    buffer = io.BytesIO()
    Image.frombytes("RGB", (56, 56), noise).save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


SEEN = "<|vision_start|><|image_pad|><|vision_end|>what is it?"
GREEDY = {"temperature": 0.0, "max_new_tokens": 24, "ignore_eos": True}


async def _looks(sampler, beside: int) -> tuple[list, list]:
    """Plain requests with images, and mixed ones of text in the same batches."""
    rng = random.Random(71)
    cases = [Case(random_ids(rng, 20), random_ids(rng, 30), 24) for _ in range(beside)]
    engine = sampler.engine
    looks = [engine.async_generate(prompt=SEEN, image_data=[image(i)], sampling_params=GREEDY) for i in range(3)]
    mixed = [engine.async_generate(input_ids=case.teacher, sampling_params=case.params()) for case in cases]
    outputs = await asyncio.gather(*mixed[:2], *looks, *mixed[2:])
    seen = outputs[2 : 2 + len(looks)] if beside else outputs
    rest = [*outputs[:2], *outputs[2 + len(looks) :]] if beside else []
    return [one["output_ids"] for one in seen], list(zip(cases, rest, strict=True))


@pytest.mark.parametrize(
    "mode",
    ["shared", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("two", "drafts"))],
)
def test_plain_requests_see_images(qwen, llama, mode):
    """The same as alone, where mixed requests share their batches; three different images."""
    drafts = {"mixing_mode": "speculative", "draft_tokens": 3} if mode == "drafts" else {}
    pair = (qwen, qwen) if mode == "shared" else (qwen, llama)
    oracle = MixedOracle(*pair, of_one=() if mode == "shared" else range(64, 68))
    with start(pair, **drafts) as sampler:
        loop = sampler.engine.loop
        alone, _ = loop.run_until_complete(_looks(sampler, 0))
        assert len({tuple(ids) for ids in alone}) == 3
        for _ in range(2):
            seen, rest = loop.run_until_complete(_looks(sampler, 5))
            assert seen == alone
            check_all(oracle, *map(list, zip(*rest, strict=True)))
        with pytest.raises(ValueError, match="image_data: not supported in a mixed request"):
            sampler.engine.generate(
                prompt=SEEN,
                image_data=[image(1)],
                sampling_params={**GREEDY, "custom_params": {"student_input_ids": [9, 10]}},
            )
        check_pools(sampler)


@pytest.mark.slow
def test_chats(qwen, llama, tmp_path):
    """Text is mixed, on both sides of a chat; images are refused there, and seen by plain requests."""
    argv = ["--model-path", str(qwen), "--student-model-path", str(llama)]
    argv += as_argv({"dtype": "float32", "max_total_tokens": 2000, "context_length": 512, "random_seed": 1})
    oracle = MixedOracle(qwen, llama, of_one=range(64, 68))
    with serve("sglang_optimal.launch_server", argv, tmp_path / "log") as client:
        body = {"model": "m", "temperature": 0, "max_tokens": 6, "return_input_ids": True}

        def post(content, **more):
            messages = [{"role": "user", "content": content}]
            return client.post("/v1/chat/completions", json={**body, "messages": messages, **more})

        mixed = {"custom_params": {"teacher_system_prompt": "seven.", "return_prompts": True}}
        answer = post("what is it?", **mixed).json()
        (series,) = answer["sglext"]["mixing"]
        expected = oracle.generate_greedy(series["teacher_prompt_ids"], series["student_prompt_ids"], 6)
        assert series["teacher_prompt_text"] == "<bos><sys>seven.<usr>what is it?<ast>"
        assert series["student_prompt_text"] == "<bos><usr>what is it?<ast>"
        assert series["alpha"] == pytest.approx(expected.alphas[: len(series["alpha"])], abs=1e-4)
        parts = [{"type": "text", "text": "what is it?"}]
        assert post(parts, **mixed).json()["choices"][0]["message"] == answer["choices"][0]["message"]
        parts.append({"type": "image_url", "image_url": {"url": image(2)}})
        refused = post(parts, **mixed)
        assert refused.status_code == 400, refused.text
        assert "messages[0].content[1]: only text is supported in a mixed request" in refused.json()["message"]
        assert post(parts).status_code == 200
        wait_until_free(client)


@pytest.mark.slow
def test_chats_by_a_template_of_sglang_s(qwen, tmp_path):
    """With one of those SGLang gives a model that sees images text in place of token ids; both sides read the same."""
    argv = ["--model-path", str(qwen), "--chat-template", "chatml"]
    argv += as_argv({"dtype": "float32", "max_total_tokens": 2000, "context_length": 512, "random_seed": 1})
    with serve("sglang_optimal.launch_server", argv, tmp_path / "log") as client:
        messages = [{"role": "user", "content": "what is it?"}]
        body = {"model": "m", "temperature": 0, "max_tokens": 6, "messages": messages}
        mixed = {"student_messages": messages, "return_prompts": True}
        answer = client.post("/v1/chat/completions", json={**body, "custom_params": mixed}).json()
        (series,) = answer["sglext"]["mixing"]
        assert series["teacher_prompt_ids"] == series["student_prompt_ids"] and len(series["teacher_prompt_ids"]) > 10
        plain = client.post("/v1/chat/completions", json=body).json()
        assert answer["choices"][0]["message"] == plain["choices"][0]["message"]
        assert answer["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"]
        wait_until_free(client)

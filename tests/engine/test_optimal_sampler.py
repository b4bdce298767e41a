"""OptimalSampler, the offline API."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from harness import check_pools, start
from oracle import MixedOracle
from safetensors.torch import load_file, save_file

from sglang_optimal import AlphaStats, GenerationResult, OptimalSampler

TEACHERS = ["what is 12 + 3? it is 15.", "name a color. say red.", "one two three four"]
STUDENTS = ["what is 12 + 3?", "name a color.", "one two"]
GREEDY = {"temperature": 0.0, "max_new_tokens": 10, "ignore_eos": True}


@pytest.fixture(scope="module")
def sampler(tiny_pair):
    with start(tiny_pair, alpha_max=0.9, teacher_system_prompt="be wise.", student_system_prompt="be short.") as engine:
        yield engine


@pytest.fixture(autouse=True)
def pools_are_full_again(sampler):
    sampler.clear_alpha_history()
    yield
    if sampler.engine is not None:
        check_pools(sampler)


@pytest.fixture(scope="module")
def encode(sampler):
    return sampler.engine.tokenizer_manager.tokenizer.encode


def expected(oracle, encode, teacher, student, **alpha):
    ids = encode("be wise.\n\n" + teacher), encode("be short.\n\n" + student)
    return oracle.generate_greedy(*ids, 10, alpha_max=0.9, **alpha)


def test_one_prompt(sampler, tiny_oracle, encode):
    result = sampler.generate(TEACHERS[0], STUDENTS[0], return_mixing_info=True, **GREEDY)
    assert isinstance(result, GenerationResult)
    answer = expected(tiny_oracle, encode, TEACHERS[0], STUDENTS[0])
    assert result.token_ids == answer.token_ids
    assert result.finish_reason == "length"
    assert result.alphas == pytest.approx(answer.alphas, abs=1e-4)
    assert result.alpha.count == 10
    assert result.alpha.mean == pytest.approx(sum(answer.alphas) / 10, abs=1e-4)
    assert result.alpha.min == min(result.alphas) and result.alpha.max == max(result.alphas)
    assert set(result.mixing_info) == {
        "teacher_logprob", "student_logprob", "mixture_logprob", "kl_to_student", "kl_to_teacher", "ess_ratio",
    }  # fmt: skip
    assert result.mixing_info["student_logprob"] == pytest.approx(answer.student_logprobs, abs=1e-3)
    assert sampler.generate(TEACHERS[0], STUDENTS[0], **GREEDY).mixing_info == {}


def test_batch_and_settings_over_the_defaults(sampler, tiny_oracle, encode):
    results = sampler.generate(TEACHERS, STUDENTS, alpha_method="entropy", sampling_params=GREEDY)
    for i, result in enumerate(results):
        assert result.index == i
        answer = expected(tiny_oracle, encode, TEACHERS[i], STUDENTS[i], alpha_method="entropy")
        assert result.token_ids == answer.token_ids
        assert result.text


def test_same_prompts_for_both_when_none_are_given(sampler, tiny_oracle, encode):
    result = sampler.generate(TEACHERS[1], **GREEDY)
    assert result.token_ids == expected(tiny_oracle, encode, TEACHERS[1], TEACHERS[1]).token_ids


def test_token_ids_and_messages(sampler, tiny_oracle):
    ids = sampler.generate([[10, 11, 12], [20, 21]], [[13], [22, 23, 24]], **GREEDY)
    assert ids[1].token_ids == tiny_oracle.generate_greedy([20, 21], [22, 23, 24], 10, alpha_max=0.9).token_ids
    chat = sampler.generate([{"role": "user", "content": "hi"}], [{"role": "user", "content": "yo"}], **GREEDY)
    tokenizer = sampler.engine.tokenizer_manager.tokenizer

    def render(system, user):
        return tokenizer(f"<bos><sys>{system}<usr>{user}<ast>", add_special_tokens=False).input_ids

    answer = tiny_oracle.generate_greedy(render("be wise.", "hi"), render("be short.", "yo"), 10, alpha_max=0.9)
    assert chat.token_ids == answer.token_ids


def test_n_samples_a_prompt(sampler):
    results = sampler.generate(TEACHERS[:2], STUDENTS[:2], n=3, temperature=1.5, max_new_tokens=8, ignore_eos=True)
    assert [r.index for r in results] == [0, 0, 0, 1, 1, 1]
    assert len({tuple(r.token_ids) for r in results}) > 2
    assert len(sampler.generate(TEACHERS[0], STUDENTS[0], n=2, max_new_tokens=4)) == 2


def test_streaming(sampler):
    whole = sampler.generate(TEACHERS, STUDENTS, **GREEDY)
    last: dict[int, GenerationResult] = {}
    for chunk in sampler.generate(TEACHERS, STUDENTS, stream=True, return_mixing_info=True, **GREEDY):
        assert len(chunk.alphas) == len(chunk.token_ids) == len(chunk.mixing_info["kl_to_student"])
        assert chunk.index not in last or last[chunk.index].finish_reason is None
        last[chunk.index] = chunk
    assert [last[i].token_ids for i in range(3)] == [r.token_ids for r in whole]
    assert all(chunk.finish_reason == "length" for chunk in last.values())


def test_scores(sampler):
    """Of samples' own tokens they are their series; text and token ids are the same."""
    drawn = sampler.generate(TEACHERS, STUDENTS, return_mixing_info=True, fixed_alpha=0.4, **GREEDY)
    ids = [result.token_ids for result in drawn]
    scored = sampler.score(TEACHERS, STUDENTS, ids, return_top_k=2, fixed_alpha=0.4, temperature=0)
    for result, score in zip(drawn, scored, strict=True):
        assert score.token_ids == result.token_ids and score.text == result.text
        assert score.alphas == pytest.approx(result.alphas, abs=1e-4)
        for name, values in result.mixing_info.items():
            assert score.mixing_info[name] == pytest.approx(values, abs=2e-4, rel=2e-4), name
        assert score.top_k["teacher"]["ids"].shape == (len(result.token_ids), 2)
    one = sampler.score(TEACHERS[0], STUDENTS[0], drawn[0].text, return_mixing_info=["student_rank"], temperature=0)
    assert one.mixing_info.keys() == {"student_rank"} and len(one.alphas) == len(one.token_ids)
    assert one.text == drawn[0].text
    with pytest.raises(ValueError, match="completions: 2 of them for 3 prompts"):
        sampler.score(TEACHERS, STUDENTS, ids[:2])


@pytest.mark.parametrize("stream", [False, True])
def test_the_most_likely_tokens_and_series_by_name(sampler, stream):
    """As arrays, which grow with a stream."""
    asked = {"return_mixing_info": ("mixture_entropy", "mixture_logprob"), "return_top_k": 4, "top_k_of": "mixture"}
    results = sampler.generate(TEACHERS, STUDENTS, stream=stream, **asked, **GREEDY)
    if stream:
        results = {chunk.index: chunk for chunk in results}.values()
    for result in results:
        assert result.mixing_info.keys() == {"mixture_entropy", "mixture_logprob"}
        entry = result.top_k["mixture"]
        assert entry["ids"].shape == entry["teacher_logprobs"].shape == (len(result.token_ids), 4)
        assert entry["ids"][:, 0].tolist() == result.token_ids  # greedy
        assert entry["mixture_logprobs"][:, 0].tolist() == pytest.approx(
            result.mixing_info["mixture_logprob"], abs=1e-5
        )
    assert sampler.generate(TEACHERS[0], STUDENTS[0], **GREEDY).top_k == {}
    both = sampler.generate(TEACHERS[0], STUDENTS[0], return_top_k=2, top_k_of=("student", "teacher"), **GREEDY)
    assert both.top_k.keys() == {"teacher", "student"}


def test_asyncio(sampler):
    async def both():
        whole = await asyncio.gather(
            sampler.async_generate(TEACHERS[0], STUDENTS[0], **GREEDY),
            sampler.async_generate(TEACHERS[1:], STUDENTS[1:], **GREEDY),
        )
        stream = await sampler.async_generate(TEACHERS[0], STUDENTS[0], stream=True, **GREEDY)
        chunks = [chunk async for chunk in stream]
        return whole, chunks

    (one, two), chunks = asyncio.run(both())
    assert chunks[-1].token_ids == one.token_ids
    assert [r.token_ids for r in two] == [r.token_ids for r in sampler.generate(TEACHERS[1:], STUDENTS[1:], **GREEDY)]


def test_inside_a_running_loop_and_an_abandoned_stream(sampler):
    """As in a notebook: blocking calls inside a running loop; then a stream that nobody reads to its end."""

    async def cell():
        result = sampler.generate(TEACHERS[0], STUDENTS[0], **GREEDY)
        stream = await sampler.async_generate(
            TEACHERS[0], STUDENTS[0], stream=True, max_new_tokens=900, ignore_eos=True
        )
        async for _ in stream:
            break
        await stream.aclose()
        return result

    result = asyncio.run(cell())
    assert result.token_ids == sampler.generate(TEACHERS[0], STUDENTS[0], **GREEDY).token_ids


def test_from_many_threads(sampler):
    alone = [sampler.generate(t, s, **GREEDY).token_ids for t, s in zip(TEACHERS, STUDENTS, strict=True)]
    with ThreadPoolExecutor(12) as pool:
        jobs = [pool.submit(sampler.generate, TEACHERS[i % 3], STUDENTS[i % 3], **GREEDY) for i in range(24)]
        assert [job.result().token_ids for job in jobs] == [alone[i % 3] for i in range(24)]


def test_new_student_weights(sampler, tiny_pair, tiny_oracle, tmp_path):
    ids = {"prompts": [10, 11, 12], "student_prompts": [13, 14]}
    old = load_file(tiny_pair[1] / "model.safetensors")
    new = {name: tensor.flip(0) for name, tensor in old.items()}
    sampler.update_student_weights(new)
    shutil.copytree(tiny_pair[1], tmp_path / "student")
    save_file({name: tensor.contiguous() for name, tensor in new.items()}, tmp_path / "student" / "model.safetensors")
    oracle = MixedOracle(tiny_pair[0], tmp_path / "student")
    answer = oracle.generate_greedy(*ids.values(), 10, alpha_max=0.9).token_ids
    assert sampler.generate(**ids, **GREEDY).token_ids == answer
    with pytest.raises(ValueError, match="lm_head.extra: the student has no tensor of this name"):
        sampler.update_student_weights({**new, "lm_head.extra": torch.zeros(2)})
    assert sampler.generate(**ids, **GREEDY).token_ids == answer
    sampler.update_student_weights(tiny_pair[1])
    answer = tiny_oracle.generate_greedy(*ids.values(), 10, alpha_max=0.9).token_ids
    assert sampler.generate(**ids, **GREEDY).token_ids == answer


def test_alpha_history(sampler, tmp_path):
    results = sampler.generate(TEACHERS, STUDENTS, **GREEDY)
    list(sampler.generate(TEACHERS[0], STUDENTS[0], stream=True, **GREEDY))
    path = tmp_path / "alphas.json"
    sampler.save_alpha_history(path)
    saved = json.loads(path.read_text())
    assert [g["call"] - saved["generations"][0]["call"] for g in saved["generations"]] == [0, 0, 0, 1]
    assert saved["generations"][0]["alphas"] == pytest.approx(results[0].alphas, abs=1e-5)
    assert saved["stats"]["count"] == 40 == sampler.alpha_stats().count
    sampler.clear_alpha_history()
    assert sampler.alpha_stats().count == 0


def test_alpha_stats():
    stats = AlphaStats.of([0.2, 0.4, 0.6])
    assert stats.mean == pytest.approx(0.4) and stats.std == pytest.approx(math.sqrt(0.08 / 3))
    assert math.isnan(AlphaStats.of([]).mean)


@pytest.mark.parametrize(
    "arguments,message",
    [
        (([], None), "prompts: is empty"),
        (("", None), "prompts: is empty"),
        ((["a", ""], None), r"prompts\[1\]: is empty"),
        ((["a", "b"], ["a"]), "student_prompts: 1 of them for 2 prompts"),
        (("a", ["a"]), "student_prompts: 1 of them for 1 prompts"),
        ((5, None), "prompts: must be text"),
        ((["a", 5], None), r"prompts\[1\]: must be text"),
        (([[1, "a"]], None), r"prompts\[0\]: must be text, or all token ids"),
    ],
)
def test_wrong_prompts(sampler, arguments, message):
    with pytest.raises(ValueError, match=message):
        sampler.generate(*arguments)


def test_wrong_settings(sampler):
    with pytest.raises(ValueError, match="unknown key 'max_tokens'.*max_new_tokens"):
        sampler.generate("a", max_tokens=5)
    with pytest.raises(ValueError, match="alpha_method: 'best'"):
        sampler.generate("a", alpha_method="best")


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"student": "/nowhere/model"}, "--student-model-path: no model at /nowhere/model"),
        ({"alpha_min": 0.9, "alpha_max": 0.1}, "alpha_min: 0.9 is greater"),
        ({"alpha_method": "newton"}, "alpha_method: 'newton'"),
        ({"student_max_total_tokens": -5}, "student_max_total_tokens"),
        ({"mem_fraction_statik": 0.5}, "unknown key 'mem_fraction_statik'. Did you mean 'mem_fraction_static'"),
        ({"dwdp_size": 2}, "--dwdp-size"),
        ({"enable_mixed_chunk": True}, "--enable-mixed-chunk"),
        ({"sampling_backend": "pytorch"}, "--sampling-backend"),
    ],
)
def test_wrong_construction(tiny_pair, arguments, message):
    """Before any model is loaded."""
    with pytest.raises(ValueError, match=message):
        OptimalSampler(str(tiny_pair[0]), **{"student": str(tiny_pair[1]), **arguments})


def test_tokenizers_that_disagree(tiny_pair, tmp_path):
    import shutil

    other = tmp_path / "other"
    shutil.copytree(tiny_pair[1], other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(
        ValueError,
        match="tokenizer disagrees with the teacher's: 2 ids mean different tokens: id [0-9]+ is 'a' for",
    ):
        OptimalSampler(str(tiny_pair[0]), str(other))


def test_shutdown_is_final(sampler):
    """Last: the fixture's engine is gone after it."""
    sampler.shutdown()
    sampler.shutdown()
    with pytest.raises(RuntimeError, match="shut down"):
        sampler.generate("a")

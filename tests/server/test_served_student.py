"""The served model is the student (``--teacher-model-path``): the same mixture, and what SGLang says of a request's
prompt, its weights and its plain answers is the student's."""

from __future__ import annotations

import base64
import random

import pytest
from harness import SMALL, check_all, random_cases, random_ids
from oracle import MixedOracle
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from serving import as_argv, generate, message_of, serve, server_info, wait_until_free
from tiny_models import build_tiny_tokenizer_model

from sglang_optimal.config import MixingConfig
from sglang_optimal.runtime.managers.tokenizer_manager import MixedTokenizerManager

GREEDY = {"temperature": 0.0, "max_new_tokens": 10, "ignore_eos": True}


@pytest.fixture(scope="module", params=["two models", pytest.param("one model", marks=pytest.mark.slow)])
def setup(request, tiny_pair, tiny_oracle, self_oracle, tmp_path_factory):
    """(client, oracle, the student alone)"""
    shared = request.param == "one model"
    student, oracle = (tiny_pair[0], self_oracle) if shared else (tiny_pair[1], tiny_oracle)
    argv = ["--model-path", str(student), "--teacher-model-path", str(tiny_pair[0]), "--mixing-self-check", "on"]
    argv += ["--enable-metrics", "--chunked-prefill-size", "16", *as_argv(SMALL)]
    log = tmp_path_factory.mktemp("served-student") / "log"
    with serve("sglang_optimal.launch_server", argv, log) as client:
        yield client, oracle, MixedOracle(student, student)
        wait_until_free(client)


def test_the_mixture_is_the_same(setup):
    """Whichever side's context is the field."""
    client, oracle, alone = setup
    cases = random_cases(31, 8, 0)
    usual = [generate(client, input_ids=case.teacher, sampling_params=case.params()) for case in cases]
    check_all(oracle, cases, usual)
    for case, output in zip(cases, usual, strict=True):
        params = case.params()
        del params["custom_params"]["student_input_ids"]
        params["custom_params"]["teacher_input_ids"] = case.teacher
        mine = generate(client, input_ids=case.student, sampling_params=params)
        assert mine["output_ids"] == output["output_ids"]
        assert mine["meta_info"]["prompt_tokens"] == len(case.student)
        assert output["meta_info"]["prompt_tokens"] == len(case.teacher)
    for case in cases[:3]:
        plain = generate(client, input_ids=case.student, sampling_params={**GREEDY, "max_new_tokens": case.n})
        assert plain["output_ids"] == alone.plain_greedy(case.student, case.n)


def test_logprobs_of_the_prompt_are_the_student_s(setup):
    client, _, _ = setup
    ids = random_ids(random.Random(4), 12)
    asked = {"input_ids": ids, "return_logprob": True, "logprob_start_len": 0}
    plain = generate(client, **asked, sampling_params=GREEDY)["meta_info"]["input_token_logprobs"]
    custom = {"teacher_input_ids": random_ids(random.Random(5), 20)}
    mixed = generate(client, **asked, sampling_params={**GREEDY, "custom_params": custom})["meta_info"]
    assert [item[1] for item in mixed["input_token_logprobs"]] == ids
    assert [item[0] for item in mixed["input_token_logprobs"][1:]] == pytest.approx(
        [item[0] for item in plain[1:]], abs=1e-4
    )
    refused = {**asked, "sampling_params": {**GREEDY, "custom_params": {"student_input_ids": ids}}}
    assert "logprob_start_len: the prompt is the teacher's" in message_of(client.post("/generate", json=refused))


def test_scores_and_chats(setup):
    client, _, _ = setup
    scored = {"completion_input_ids": [20, 21, 22], "return_mixing_info": True}

    def score(own: list[int], **other) -> dict:
        body = {"input_ids": own, "sampling_params": {"custom_params": {**other, **scored}}}
        return client.post("/score_mixture", json=body).json()["meta_info"]

    mine, usual = score([12, 13], teacher_input_ids=[9, 10, 11]), score([9, 10, 11], student_input_ids=[12, 13])
    for name in ("alpha", "teacher_logprob", "student_logprob"):
        assert mine[name] == pytest.approx(usual[name], abs=1e-5)
    generated = generate(
        client, input_ids=[12, 13], sampling_params={**GREEDY, "custom_params": {
            "teacher_input_ids": [9, 10, 11], "return_mixing_info": True}},
    )  # fmt: skip
    again = {
        "teacher_input_ids": [9, 10, 11],
        "completion_input_ids": generated["output_ids"],
        "return_mixing_info": True,
    }
    meta = client.post(
        "/score_mixture", json={"input_ids": [12, 13], "sampling_params": {"custom_params": again}}
    ).json()
    for name in ("alpha", "teacher_logprob", "student_logprob", "mixture_logprob"):
        assert meta["meta_info"][name] == pytest.approx(generated["meta_info"][name], abs=2e-4)
    messages, hint = [{"role": "user", "content": "a b"}], [{"role": "system", "content": "c"}]
    body = {"model": "m", "messages": messages, "max_tokens": 4, "temperature": 0}
    custom = {"return_mixing_info": True, "return_prompts": True}
    plain = client.post("/v1/chat/completions", json=body).json()
    for fields, own in (({"teacher_only_messages": hint}, "student"), ({"student_messages": hint}, "teacher")):
        answer = client.post("/v1/chat/completions", json={**body, "custom_params": {**custom, **fields}}).json()
        said = answer["sglext"]["mixing"][0]
        assert answer["usage"]["prompt_tokens"] == len(said[f"{own}_prompt_ids"]) == plain["usage"]["prompt_tokens"]
        assert len(said["teacher_prompt_ids"]) != len(said["student_prompt_ids"])


def test_what_the_server_says(setup, tiny_pair):
    client, _, _ = setup
    mixing = server_info(client)["internal_states"][0]["mixing"]
    shared = mixing["shared_weights"]
    assert mixing["served_model"] == "student" and mixing["teacher_model_path"] == str(tiny_pair[0])
    assert mixing["student_model_path"] == str(tiny_pair[0 if shared else 1])
    assert mixing["policy"] == ("both" if shared else "student")
    assert max(mixing["self_check"][f"{side}_distance"] for side in ("teacher", "student")) < 1e-3
    assert "requests" in mixing["teacher_pool"] and "evictable" in mixing["student_pool"]
    assert "sglang_optimal:teacher_pool_usage" in client.get("/metrics").text


def test_new_weights_of_the_served_student(setup, tiny_pair, tmp_path):
    """By safetensors over HTTP; the teacher keeps its own."""
    client, oracle, _ = setup
    if server_info(client)["internal_states"][0]["mixing"]["shared_weights"]:
        shape: dict = {}
    else:
        shape = {"hidden_size": 32, "num_layers": 1, "vocab_size": 80}
    new = build_tiny_tokenizer_model(tmp_path / "new", seed=8, **shape)
    old = tiny_pair[1] if shape else tiny_pair[0]
    case = random_cases(33, 1, 0)[0]

    def update(folder, version):
        payload = base64.b64encode(safetensors_bytes(load_file(folder / "model.safetensors"))).decode()
        body = {"serialized_named_tensors": [payload], "load_format": "safetensors", "weight_version": version}
        for route, sent in (
            ("/begin_weight_update", {}), ("/update_weights_from_tensor", body), ("/end_weight_update", {}),
        ):  # fmt: skip
            response = client.post(route, json=sent)
            assert response.status_code == 200, response.text

    update(new, "new")
    output = generate(client, input_ids=case.teacher, sampling_params=case.params())
    check_all(MixedOracle(tiny_pair[0] if shape else new, new), [case], [output])
    assert output["meta_info"]["student_weight_version"] == "new"
    update(old, "old")
    check_all(oracle, [case], [generate(client, input_ids=case.teacher, sampling_params=case.params())])
    refused = client.post("/update_weights_from_tensor", json={"serialized_named_tensors": ["gASVCgAAAAAAAAB9lC4="]})
    assert refused.status_code == 400 and "load_format: send 'safetensors'" in refused.json()["message"]


class _Tokenizer:
    """One that says whose it is."""

    def __init__(self, mark: int):
        self.mark = mark

    def encode(self, text: str, **_) -> list[int]:
        return [self.mark, *map(ord, text)]

    def decode(self, ids: list[int]) -> str:
        return f"{self.mark}: {ids}"


@pytest.mark.parametrize("served", ["teacher", "student"])
def test_each_side_s_own_tokenizer(served):
    """Also where the served model's is not the teacher's."""
    other = {"teacher": "student", "student": "teacher"}[served]
    manager = MixedTokenizerManager.__new__(MixedTokenizerManager)
    manager.mixing_config = MixingConfig(**{f"{other}_model_path": "x"})
    tokenizers = {"teacher": _Tokenizer(1), "student": _Tokenizer(2)}
    manager.tokenizer, manager.guest_tokenizer = tokenizers[served], tokenizers[other]
    prompts = manager._prompts([5], [6])
    assert (prompts["teacher_prompt_text"], prompts["student_prompt_text"]) == ("1: [5]", "2: [6]")
    assert (manager._encode_text("teacher", "a"), manager._encode_text("student", "a")) == ([1, 97], [2, 97])
    assert manager._encode_completion("a") == [2, 97]


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--student-model-path", "x"], "student_model_path: with teacher_model_path the served model is the student"),
        (["--mixing-mode", "auto"], "mixing_mode: a student that is the served model cannot draft"),
        (["--student-weights", "none"], "student_weights: 'none' does not go with teacher_model_path"),
        (["--student-weights", "shared"], "'shared' needs the served model's own path as teacher_model_path"),
    ],
)
def test_bad_settings(tiny_pair, flags, message):
    from sglang_optimal import launch_server

    argv = ["--model-path", str(tiny_pair[1]), "--teacher-model-path", str(tiny_pair[0]), *flags]
    with pytest.raises(ValueError, match=message):
        launch_server.parse(argv)

"""Servers without a student: ours, and SGLang's own on our CPU platform."""

from __future__ import annotations

import pytest
from harness import SMALL, Case, check_greedy
from serving import as_argv, generate, message_of, serve

CASE = Case([20, 31, 9, 44, 15, 60, 23], None, 16)


@pytest.mark.parametrize(
    "module", [pytest.param("sglang_optimal.launch_server", marks=pytest.mark.slow), "sglang.launch_server"]
)
def test_server_without_a_student(module, tiny_pair, tiny_oracle, tmp_path):
    argv = ["--model-path", str(tiny_pair[0]), *as_argv(SMALL)]
    if module != "sglang.launch_server":
        argv += ["--student-weights", "none"]
    with serve(module, argv, tmp_path / "log") as client:
        request = {"input_ids": CASE.teacher, "sampling_params": CASE.params()}
        check_greedy(tiny_oracle, CASE, generate(client, **request))
        if module == "sglang.launch_server":
            return
        # A mixed request must not quietly get plain text.
        for fields, name in (
            ({"student_text": "hi"}, "student_text"),
            ({"alpha_min": 0.2}, "alpha_min"),
            ({"student_input_ids": [10], "return_mixing_info": True}, "student_input_ids"),
        ):
            mixed = {**request, "sampling_params": {**CASE.params(), "custom_params": fields}}
            message = message_of(client.post("/generate", json=mixed))
            assert message.startswith(f"{name}: this server has no student model")
            assert "--student-weights none" in message
        # custom_params belongs to custom logit processors too.
        other = {**request, "sampling_params": {**CASE.params(), "custom_params": {"mine": 1}}}
        check_greedy(tiny_oracle, CASE, generate(client, **other))

"""Frontend programs without a server of one's own: an OptimalSampler as backend, and `so.Runtime`."""

from __future__ import annotations

import pytest
import sglang as sgl
from harness import SMALL, check_pools, start
from tiny_models import small_ids, small_text

import sglang_optimal as so

PROBLEM, HINT = "what is 12+30? ", "it is 42. what is 12+30? "
GREEDY = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}


@sgl.function
def solve(s, problem, hint):
    s += problem + so.mixed_gen("x", teacher_ctx=hint, **GREEDY) + " "
    s += sgl.gen("plain", **GREEDY) + sgl.select("choice", ["yes", "no"])


def expected(oracle, teacher, student) -> str:
    return small_text(oracle.generate_greedy(small_ids(teacher), small_ids(student), 12).token_ids)


def test_optimal_sampler_is_a_backend(tiny_pair, tiny_oracle):
    with start(tiny_pair) as sampler:
        prompts = {"prompts": small_ids(HINT), "student_prompts": small_ids(PROBLEM)}
        settings = {"temperature": 0.0, "max_new_tokens": 12, "ignore_eos": True}
        before = sampler.generate(**prompts, **settings)

        state = solve.run(problem=PROBLEM, hint=HINT, backend=sampler)
        assert state["x"] == expected(tiny_oracle, HINT, PROBLEM) == before.text
        assert len(state.get_meta_info("x")["alpha"]) == 12
        text = PROBLEM + state["x"] + " "
        assert state["plain"] == small_text(tiny_oracle.plain_greedy(small_ids(text), 12))
        assert state["choice"] in ("yes", "no")

        batch = [{"problem": f"what is {i}+30? ", "hint": f"copy {i + 30}. "} for i in range(8)]
        states = solve.run_batch(batch, backend=sampler, num_threads=8)
        assert [s["x"] for s in states] == [expected(tiny_oracle, b["hint"], b["problem"]) for b in batch]

        state = solve.run(problem=PROBLEM, hint=HINT, backend=sampler, stream=True)
        assert "".join(state.text_iter("x")) == before.text
        state.sync()

        sgl.set_default_backend(sampler)
        sgl.flush_cache()
        assert "mixing" in sgl.get_server_info()["internal_states"][0]
        sgl.set_default_backend(None)
        assert sampler.generate(**prompts, **settings).token_ids == before.token_ids
        check_pools(sampler)


@pytest.mark.slow  # a server in a process of its own; tests/lang/test_server.py has the frontend beside one
def test_runtime(tiny_pair, tiny_oracle):
    teacher, student = map(str, tiny_pair)
    with so.Runtime(teacher, student, alpha_method="ess_balance", api_key="a-key", **SMALL) as runtime:
        state = solve.run(problem=PROBLEM, hint=HINT, backend=runtime)
        answer = tiny_oracle.generate_greedy(small_ids(HINT), small_ids(PROBLEM), 12, alpha_method="ess_balance")
        assert state["x"] == small_text(answer.token_ids)
        assert runtime.endpoint.get_server_info()["internal_states"][0]["mixing"]["student_model_path"] == student


def test_runtime_refuses_before_it_starts_anything(tiny_pair):
    teacher, student = map(str, tiny_pair)
    for arguments, message in (
        ({"alpha_method": "kl"}, "alpha_method: 'kl' is not one of"),
        ({"mem_fraction_statc": 0.5}, "Runtime: unknown key 'mem_fraction_statc'. Did you mean 'mem_fraction_static'"),
        ({"student_model_path": "/no/such/student"}, "--student-model-path: no model at /no/such/student"),
    ):
        with pytest.raises(ValueError, match=message):
            so.Runtime(teacher, **{"student_model_path": student, **SMALL, **arguments})

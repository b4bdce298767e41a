"""mixed_gen against a running server: the text of the same request made by hand, in every way SGLang runs programs."""

from __future__ import annotations

import asyncio

import pytest
import sglang as sgl
from serving import generate
from tiny_models import small_chat_ids, small_ids, small_text

import sglang_optimal as so

PROBLEM, HINT = "what is 12+30? ", "it is 42. what is 12+30? "
GREEDY = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}


@pytest.fixture(scope="module")
def backend(client):
    return sgl.RuntimeEndpoint(str(client.base_url).rstrip("/"))


def expected(oracle, teacher=HINT, student=PROBLEM, n=12, **alpha) -> str:
    return small_text(oracle.generate_greedy(small_ids(teacher), small_ids(student), n, **alpha).token_ids)


@sgl.function
def solve(s, problem, hint):
    s += problem + so.mixed_gen("x", teacher_ctx=hint, **GREEDY) + "."


def test_run(backend, client, tiny_oracle):
    state = solve.run(problem=PROBLEM, hint=HINT, backend=backend)
    assert state["x"] == expected(tiny_oracle)
    assert state.text() == PROBLEM + state["x"] + "."
    meta = state.get_meta_info("x")
    assert len(meta["alpha"]) == len(meta["kl_to_student"]) == 12
    params = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True, "custom_params": {"student_text": PROBLEM}}
    assert generate(client, text=HINT, sampling_params=params)["text"] == state["x"]


def test_the_most_likely_tokens(backend):
    @sgl.function
    def look(s):
        asked = {"return_mixing_info": ["teacher_rank"], "return_top_k": 2, "top_k_of": "teacher"}
        s += PROBLEM + so.mixed_gen("x", teacher_ctx=HINT, **asked, **GREEDY)

    meta = look.run(backend=backend).get_meta_info("x")
    ids = meta["top_k"]["teacher"]["ids"]
    assert len(ids) == len(meta["teacher_rank"]) == 12 and all(len(row) == 2 for row in ids)
    assert "kl_to_student" not in meta


def test_run_batch_with_progress_bar(backend, tiny_oracle, capsys):
    batch = [{"problem": f"what is {i}+30? ", "hint": f"copy {i + 30}. "} for i in range(8)]
    states = solve.run_batch(batch, backend=backend, num_threads=8, progress_bar=True)
    for state, arguments in zip(states, batch, strict=True):
        assert state["x"] == expected(tiny_oracle, arguments["hint"], arguments["problem"])
    assert "8/8" in capsys.readouterr().err


def test_stream(backend, tiny_oracle):
    state = solve.run(problem=PROBLEM, hint=HINT, backend=backend, stream=True)
    pieces = list(state.text_iter("x"))
    assert "".join(pieces) == expected(tiny_oracle)
    assert len(state.get_meta_info("x")["alpha"]) == 12

    async def read():
        state = solve.run(problem=PROBLEM, hint=HINT, backend=backend, stream=True)
        return "".join([piece async for piece in state.text_async_iter("x")])

    assert asyncio.run(read()) == expected(tiny_oracle)


def test_fork(backend, tiny_oracle):
    @sgl.function
    def program(s):
        s += PROBLEM
        forks = s.fork(3)
        forks += lambda i: so.mixed_gen("x", teacher_ctx=f"copy {i}. ", **GREEDY)
        forks.join()

    found = program.run(backend=backend)["x"]
    assert found == [expected(tiny_oracle, f"copy {i}. ") for i in range(3)]


def test_roles_and_messages(backend, tiny_oracle):
    problem, answer = [{"role": "user", "content": "what is 2+2?"}], [{"role": "user", "content": "copy 4"}]

    @sgl.function
    def program(s):
        s += sgl.user("hello")
        with s.assistant():
            s += so.mixed_gen("x", teacher_ctx=answer, student_ctx=problem, **GREEDY)
        s += sgl.user("and now?")
        s += sgl.assistant(so.mixed_gen("y", teacher_ctx=so.state_text() + "hint: 4", **GREEDY))

    state = program.run(backend=backend)
    ids = small_chat_ids(("user", "copy 4")), small_chat_ids(("user", "what is 2+2?"))
    assert state["x"] == small_text(tiny_oracle.generate_greedy(*ids, 12).token_ids)
    assert [message["role"] for message in state.messages()] == ["user", "assistant"] * 2
    assert state.messages()[1]["content"] == state["x"].lstrip()
    assert len(state.get_meta_info("y")["alpha"]) == 12


def test_constraints_and_settings(backend, tiny_oracle):
    @sgl.function
    def program(s):
        s += PROBLEM
        s += so.mixed_gen("number", teacher_ctx=HINT, dtype=int, max_tokens=4, temperature=0)
        s += so.mixed_gen("word", teacher_ctx=HINT, regex="(yes|no)", max_tokens=8)
        s += so.mixed_gen("ids", teacher_ctx=HINT, student_ctx=[20, 21, 22], fixed_alpha=1.5, **GREEDY)

    state = program.run(backend=backend)
    assert int(state["number"]) is not None
    assert state["word"] in ("yes", "no")
    answer = tiny_oracle.generate_greedy(small_ids(HINT), [20, 21, 22], 12, alpha_method="fixed", fixed_alpha=1.5)
    assert state["ids"] == small_text(answer.token_ids)
    assert state.get_meta_info("ids")["alpha"] == [1.5] * 12


def test_the_server_s_refusal_reaches_the_program(backend):
    @sgl.function
    def program(s):
        s += so.mixed_gen("x", teacher_ctx="a", student_ctx=[1, 99])

    with pytest.warns(UserWarning, match="student_input_ids"):
        state = program.run(backend=backend)
        error = state.error()
    assert "student_input_ids[1]: 99 is outside the vocabulary" in str(error)

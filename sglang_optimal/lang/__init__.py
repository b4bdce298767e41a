"""`mixed_gen` for SGLang's frontend language: a generation that two models share, each reading its own context.

Example:
    >>> @sgl.function
    ... def solve(s, problem, answer):
    ...     s += "Question: " + problem + "\\nAnswer:"
    ...     s += so.mixed_gen("solution", teacher_ctx=f"Question: {problem}\\nCopy: {answer}\\nAnswer:")
    >>> solve.run(problem="2+2=?", answer="4", backend=sgl.RuntimeEndpoint("http://localhost:30000"))["solution"]
"""

from sglang_optimal.lang.contexts import StateText, StateVar, state_text, state_var
from sglang_optimal.lang.execute import install
from sglang_optimal.lang.expr import MixedSglGen, mixed_gen
from sglang_optimal.lang.runtime import Runtime

install()

__all__ = ["MixedSglGen", "Runtime", "StateText", "StateVar", "mixed_gen", "state_text", "state_var"]

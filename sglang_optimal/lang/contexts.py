"""What a model reads in a `mixed_gen`: checked when the expression is made, resolved when its state gets there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from sglang.lang.interpreter import StreamExecutor
from sglang.lang.ir import (
    SglArgument,
    SglConstantText,
    SglExpr,
    SglExprList,
    SglRoleBegin,
    SglRoleEnd,
    SglVariable,
)

Context: TypeAlias = str | Sequence[dict[str, Any]] | Sequence[int] | SglExpr | None
"""Text, chat messages, token ids (the student's only), an expression; None: the text of the state so far."""


class StateText(SglExpr):
    """The text of the state so far, inside a context's expression; see `state_text`."""

    def __repr__(self) -> str:
        return "StateText()"


class StateVar(SglExpr):
    """A variable of the state, inside a context's expression; see `state_var`."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def __repr__(self) -> str:
        return f"StateVar({self.name!r})"


def state_text() -> StateText:
    """The text of the state so far, for a context: ``teacher_ctx="Hint: 42.\\n" + state_text()``.

    Unlike ``s.text()`` it does not wait: it is read when the state gets there.
    """
    return StateText()


def state_var(name: str) -> StateVar:
    """What was generated under ``name`` before, for a context; read when the state gets there."""
    return StateVar(name)


_IN_A_CONTEXT = SglConstantText | SglArgument | SglVariable | SglRoleBegin | SglRoleEnd | StateText | StateVar


def checked(context: Context, field: str, *, token_ids: bool) -> Context:
    """The context, if it can be one.

    Raises:
        ValueError: names the field and the fix.
    """
    if context is None or isinstance(context, SglExpr):
        _check_expression(context, field)
        return context
    if isinstance(context, str):
        if not context:
            raise ValueError(f"{field}: is empty; leave it out for the text of the state so far.")
        return context
    if not isinstance(context, Sequence) or isinstance(context, bytes) or not context:
        raise ValueError(f"{field}: must be text, chat messages or an expression, got {context!r}.")
    if all(isinstance(message, dict) for message in context):
        for position, message in enumerate(context):
            if not isinstance(message.get("role"), str) or "content" not in message:
                raise ValueError(f"{field}[{position}]: must be a mapping with 'role' and 'content'.")
        return list(context)
    if token_ids and all(isinstance(token, int) and not isinstance(token, bool) for token in context):
        return list(context)
    allowed = "text, chat messages, token ids or an expression" if token_ids else "text, chat messages or an expression"
    raise ValueError(f"{field}: must be {allowed}, got a list with {type(context[0]).__name__}.")


def _check_expression(expression: SglExpr | str | None, field: str) -> None:
    if isinstance(expression, SglExprList):
        for part in expression.expr_list:
            _check_expression(part, field)
    elif expression is not None and not isinstance(expression, str | _IN_A_CONTEXT):
        raise ValueError(f"{field}: {expression!r} has no place in a context; text, roles and state_*() have.")


def resolve(context: Context, executor: StreamExecutor) -> str | list[dict[str, Any]] | list[int]:
    """The context's text, messages or token ids at this point of the state.

    Raises:
        ValueError: a `state_var` that the state does not have.
    """
    if context is None:
        return executor.text_
    if not isinstance(context, SglExpr):
        return context if isinstance(context, str) else list[Any](context)
    # SGLang renders the roles, in a conversation of its own.
    scratch = StreamExecutor(
        executor.backend, {}, executor.default_sampling_para, executor.chat_template, stream=False, use_thread=False
    )
    scratch.submit(_with_values(context, executor))
    return scratch.text()


def _with_values(expression: SglExpr | str, executor: StreamExecutor) -> SglExpr | str:
    if isinstance(expression, SglExprList):
        return SglExprList([_with_values(part, executor) for part in expression.expr_list])
    if isinstance(expression, StateText):
        return SglConstantText(executor.text_)
    if isinstance(expression, SglArgument):
        return SglConstantText(expression.value)
    if isinstance(expression, StateVar):
        value = executor.variables.get(expression.name)
        if not isinstance(value, str):
            raise ValueError(f"state_var: the state has no text {expression.name!r} yet.")
        return SglConstantText(value)
    return expression

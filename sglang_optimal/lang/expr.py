"""The expression `mixed_gen`."""

from __future__ import annotations

import re
from typing import Any

from sglang.lang.ir import SglGen

from sglang_optimal.config import ALPHA_KEYS, AlphaSettings, check_known, takes_settings
from sglang_optimal.lang.contexts import Context, checked
from sglang_optimal.wanted import wanted_by


class MixedSglGen(SglGen):
    """A generation from the mixture of two models; to SGLang a kind of ``sgl.gen``, which it runs, streams and traces.

    Attributes:
        teacher_ctx, student_ctx: see `mixed_gen`.
        mixing: the alpha settings that were given, and ``return_mixing_info``.
    """

    def __init__(
        self, name: str | None, teacher_ctx: Context, student_ctx: Context, mixing: dict[str, Any], **gen: Any
    ):
        super().__init__(name, **gen)
        self.teacher_ctx = checked(teacher_ctx, "teacher_ctx", token_ids=False)
        self.student_ctx = checked(student_ctx, "student_ctx", token_ids=True)
        self.mixing = mixing

    def __repr__(self) -> str:
        return f"MixedSglGen({self.name!r})"


@takes_settings(ALPHA_KEYS)
def mixed_gen(
    name: str | None = None,
    teacher_ctx: Context = None,
    student_ctx: Context = None,
    *,
    return_mixing_info: bool | list[str] = True,
    return_top_k: int | None = None,
    top_k_of: str | list[str] | None = None,
    top_k_format: str | None = None,
    max_tokens: int | None = None,
    min_tokens: int | None = None,
    n: int | None = None,
    stop: str | list[str] | None = None,
    stop_token_ids: list[int] | None = None,
    stop_regex: str | list[str] | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    frequency_penalty: float | None = None,
    presence_penalty: float | None = None,
    ignore_eos: bool | None = None,
    return_logprob: bool | None = None,
    logprob_start_len: int | None = None,
    top_logprobs_num: int | None = None,
    return_text_in_logprobs: bool | None = None,
    dtype: type | str | None = None,
    choices: Any = None,
    choices_method: Any = None,
    regex: str | None = None,
    json_schema: str | None = None,
    **alpha: Any,
) -> MixedSglGen:
    """Generate from q* ∝ π_student^(1−α)·π_teacher^α, each model reading its own context.

    The text extends the state as that of ``sgl.gen`` does, whatever the two contexts were; ``s[name]`` is the text and
    ``s.get_meta_info(name)`` has ``alpha`` and, unless switched off, the other series, one value for each token.

    Args:
        name: variable of the state that gets the text.
        teacher_ctx, student_ctx: what each model reads: text; chat messages, rendered on the server with that model's
            own chat template; for the student also token ids; or an expression of text, roles (``sgl.user(…) +
            sgl.assistant_begin()``), `state_text` and `state_var`. None: the text of this state so far.
        return_mixing_info: all series in the meta info, not alpha alone; or the names of series, see docs/api.md.
        return_top_k, top_k_of, top_k_format: the most likely tokens in the meta info, see docs/api.md.
        max_tokens, …, json_schema: as in ``sgl.gen``; they act on the mixture.
        **alpha: over the server's defaults: ``alpha_method``, ``alpha_min``, ``alpha_max``, ``fixed_alpha``,
            ``kl_budget``, ``kl_budget_teacher``, see AlphaSettings.

    Raises:
        ValueError: names the argument and the fix. What only the server knows is refused there; the state then has it
            as ``s.error()``.
    """
    check_known(alpha, ALPHA_KEYS, "mixed_gen")
    given = {key: value for key, value in alpha.items() if value is not None}
    AlphaSettings().updated(given)
    top_k_fields = {"return_top_k": return_top_k, "top_k_of": top_k_of, "top_k_format": top_k_format}
    returned: dict[str, Any] = {"return_mixing_info": return_mixing_info}
    returned |= {name: value for name, value in top_k_fields.items() if value is not None}
    wanted_by(returned)
    if choices is not None or choices_method is not None:
        raise ValueError("choices: a choice is scored by one model; use sgl.select.")
    if n not in (None, 1):
        raise ValueError(f"n: SGLang's frontend reads one sample a call, not {n}; use s.fork(n).")
    if regex is not None:
        try:
            re.compile(regex)
        except re.error as error:
            raise ValueError(f"regex: {error}.") from None
    return MixedSglGen(
        name,
        teacher_ctx,
        student_ctx,
        {**given, **returned},
        max_new_tokens=max_tokens,
        min_new_tokens=min_tokens,
        n=n,
        stop=stop,
        stop_token_ids=stop_token_ids,
        stop_regex=stop_regex,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        frequency_penalty=frequency_penalty,
        presence_penalty=presence_penalty,
        ignore_eos=ignore_eos,
        return_logprob=return_logprob,
        logprob_start_len=logprob_start_len,
        top_logprobs_num=top_logprobs_num,
        return_text_in_logprobs=return_text_in_logprobs,
        dtype=dtype,
        regex=regex,
        json_schema=json_schema,
    )

"""Names that a server, its clients and data runs share; free of imports."""

SERIES = (
    "alpha",
    "teacher_logprob",
    "student_logprob",
    "mixture_logprob",
    "kl_to_student",
    "kl_to_teacher",
    "ess_ratio",
)
"""The per-token series of a mixed request, one value for each output token, see docs/api.md. In ``meta_info``
``alpha`` always, the others with ``return_mixing_info: true``."""

MORE_SERIES = (
    "teacher_entropy",
    "student_entropy",
    "mixture_entropy",
    "kl_student_teacher",
    "kl_teacher_student",
    "ess_student",
    "ess_teacher",
    "teacher_rank",
    "student_rank",
    "behaviour_logprob",
)
"""Series that have to be asked for by name."""

ALL_SERIES = SERIES + MORE_SERIES

SIDES = ("teacher", "student", "mixture")
"""The distributions of a token: both models' and q*."""

OTHER_MODEL = {"teacher": "student", "student": "teacher"}
"""{a model's side: the other's}."""

TOP_K = "top_k"
"""The most likely tokens of sides, in ``meta_info`` with ``return_top_k``."""

MAX_TOP_K = 1024

RESERVED_VARIABLES = (
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "conversation",
    "max_length",
    "padding",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "tokenize",
    "tokenizer_kwargs",
    "truncation",
)
"""Arguments of ``apply_chat_template`` that decide what it returns, or run a client's template: no variable of a chat
template, and never a request's to set."""

WIRE = "sglang_optimal_request"
"""Key of ``custom_params`` for what the tokenizer manager tells the scheduler of a mixed request; no client's."""

CARRIER = "mixing"
"""Key of a request's ``session_params`` under which its mixing fields may come instead of in ``custom_params``:
sglang-router passes those on, and drops the latter."""

PROMPTS = ("teacher_prompt_ids", "student_prompt_ids", "teacher_prompt_text", "student_prompt_text")
"""With ``return_prompts``, what each model really read: token ids, and their text with special tokens."""

ALGORITHM = "OPTIMAL"
"""SGLang's name of speculative mixing."""

STUDENT_ADAPTER = "student"
"""SGLang's name of the student's LoRA adapter; plain requests may ask for it with ``lora_path``."""

SETTLED = "_sglang_optimal"
"""Attribute of a launch's ServerArgs: its settled `MixingConfig`; None where it brings a configuration of its own, so
that ``SGLANG_OPTIMAL_CONFIG`` has no say in it."""

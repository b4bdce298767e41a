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
``alpha`` always, the others with ``return_mixing_info``."""

CARRIER = "mixing"
"""Key of a request's ``session_params`` under which its mixing fields may come instead of in ``custom_params``:
sglang-router passes those on, and drops the latter."""

PROMPTS = ("teacher_prompt_ids", "student_prompt_ids", "teacher_prompt_text", "student_prompt_text")
"""With ``return_prompts``, what each model really read: token ids, and their text with special tokens."""

ALGORITHM = "OPTIMAL"
"""SGLang's name of speculative mixing."""

STUDENT_ADAPTER = "student"
"""SGLang's name of the student's LoRA adapter; plain requests may ask for it with ``lora_path``."""

"""The per-token series of a mixed request; free of imports, because servers, clients and data runs all name them."""

SERIES = (
    "alpha",
    "teacher_logprob",
    "student_logprob",
    "mixture_logprob",
    "kl_to_student",
    "kl_to_teacher",
    "ess_ratio",
)
"""One value for each output token, see docs/api.md. In ``meta_info`` ``alpha`` always, the others with
``return_mixing_info``."""

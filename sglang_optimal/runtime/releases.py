"""What the supported releases of SGLang differ in; the rest of the package is written for the newest of them."""

from __future__ import annotations

from typing import Any

from sglang.srt.managers.scheduler import Scheduler

CREATES_BY_A_METHOD = hasattr(Scheduler, "_create_generation_req")
"""Whether the scheduler has a method that makes requests, since 0.5.23; before it, a request is ours from where its
length is limited, which comes next."""


def python_chat_template_exists(name: str) -> bool:
    """Whether SGLang has code of that name in place of a chat template, which it has since 0.5.23."""
    try:
        from sglang.srt.parser.python_chat_template import get_python_chat_template
    except ImportError:
        return False
    return get_python_chat_template(name) is not None


def python_chat_template(templates: Any) -> Any:
    """Of SGLang's ``TemplateManager``: code in place of a chat template, which it has since 0.5.23."""
    return getattr(templates, "python_chat_template", None)

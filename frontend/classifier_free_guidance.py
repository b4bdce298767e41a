"""Classifier-free guidance: the teacher reads the condition, the student the same prompt without it, alpha above 1.

q ∝ p(y | condition) · (p(y | condition) / p(y))^(alpha − 1): what the condition makes likelier is made likelier still.
Expect the condition to show more as alpha grows, and the text to suffer when it grows too far.
"""

from __future__ import annotations

import re

import sglang as sgl
from common import connect, finished, parser, print_table, statistics, user

import sglang_optimal as so


@sgl.function
def write(s, task: str, condition: str, alpha: float, max_tokens: int):
    s += so.mixed_gen(
        "text",
        teacher_ctx=user(f"{task} {condition}"),
        student_ctx=user(task),
        fixed_alpha=alpha,
        max_tokens=max_tokens,
        temperature=0,
    )


def main(argv: list[str] | None = None) -> list[dict]:
    arguments = parser(__doc__, max_tokens=64)
    arguments.add_argument("--task", default="Write three sentences about a walk in the morning.")
    arguments.add_argument("--condition", default="Speak about the sea, the waves and the beach.")
    arguments.add_argument("--words", default="sea,ocean,wave,waves,beach,sand,shore,water", help="counted in the text")
    arguments.add_argument("--alphas", type=float, nargs="+", default=[0.0, 0.5, 1.0, 1.5, 2.0, 4.0])
    args = arguments.parse_args(argv)
    backend = connect(args)
    batch = [
        {"task": args.task, "condition": args.condition, "alpha": alpha, "max_tokens": args.max_tokens}
        for alpha in args.alphas
    ]
    states = [finished(s, "text") for s in write.run_batch(batch, backend=backend)]
    words = set(args.words.split(","))
    rows = [
        {
            "alpha": alpha,
            "words_of_the_condition": sum(word in words for word in re.findall(r"\w+", state["text"].lower())),
            "teacher_logprob": statistics(state.get_meta_info("text"))["teacher_logprob"],
            "text": state["text"],
        }
        for alpha, state in zip(args.alphas, states, strict=True)
    ]
    print_table(f"{args.task} {args.condition}", rows)
    return rows


if __name__ == "__main__":
    main()

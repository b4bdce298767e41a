"""Contrastive decoding: what the expert finds likelier than the amateur does, by an alpha above 1 and min-p.

With a smaller student the amateur is that model. Against one model in both roles the amateur here is the same model
with a short memory: it reads the end of the prompt alone, so that what depends on the rest of it gains ("coherence
boosting", Malkin et al. 2022). min_p keeps the tokens that the mixture finds plausible (Li et al. 2023 use the
expert's). Expect the boosted text to hold on to names and facts from the beginning more than the plain one.
"""

from __future__ import annotations

import sglang as sgl
from common import connect, finished, parser, print_table, statistics

import sglang_optimal as so

STORY = (
    "Captain Elena Marsh sailed the ship Blue Heron out of Port Darrow with a cargo of tea. Her first mate was an old "
    "man called Tobias, who was afraid of cats. On the third day a storm broke the mast. When the wind had gone down,"
)


@sgl.function
def tell(s, story: str, short: str, alpha: float, min_p: float, max_tokens: int):
    s += story
    # The teacher reads the state so far, the whole story.
    s += so.mixed_gen("text", student_ctx=short, fixed_alpha=alpha, min_p=min_p, temperature=0.7, max_tokens=max_tokens)


def main(argv: list[str] | None = None) -> list[dict]:
    arguments = parser(__doc__, max_tokens=64)
    arguments.add_argument("--story", default=STORY)
    arguments.add_argument("--memory", type=int, default=6, help="words of the story that the amateur reads")
    arguments.add_argument("--names", default="Elena,Marsh,Heron,Darrow,Tobias,Captain,tea,cats,mast")
    arguments.add_argument("--alphas", type=float, nargs="+", default=[1.0, 1.5, 2.0])
    arguments.add_argument("--samples", type=int, default=4)
    arguments.add_argument("--min-p", type=float, default=0.1)
    args = arguments.parse_args(argv)
    backend = connect(args)
    short = " ".join(args.story.split()[-args.memory :])
    names = args.names.split(",")
    rows = []
    for alpha in args.alphas:
        one = {"story": args.story, "short": short, "alpha": alpha, "min_p": args.min_p, "max_tokens": args.max_tokens}
        states = [finished(s, "text") for s in tell.run_batch([one] * args.samples, backend=backend)]
        rows.append(
            {
                "alpha": alpha,
                "names_a_text": sum(s["text"].count(name) for s in states for name in names) / len(states),
                "teacher_logprob": statistics(states[0].get_meta_info("text"))["teacher_logprob"],
                "a_text": states[0]["text"],
            }
        )
    print_table(f"... {short}", rows)
    return rows


if __name__ == "__main__":
    main()

"""Word problems of one step, made at random, with worked solutions: a small model fails most of them."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

NAMES = ("Maya", "Tom", "Lina", "Omar", "Ana", "Ben", "Ines", "Paul", "Rosa", "Sam", "Wei", "Zoe")
THINGS = ("apples", "books", "coins", "shells", "stickers", "marbles", "pencils", "cards", "stones", "buttons")


@dataclasses.dataclass(frozen=True)
class WordProblem:
    """problem: for both. solution: worked, for the teacher. answer: the number alone, for the filter."""

    problem: str
    solution: str
    answer: str


def _made(problem: str, worked: str, result: int, unit: str) -> WordProblem:
    return WordProblem(problem, f"{worked} = {result} {unit}. The answer is {result}.", str(result))


def bought(rng: random.Random, name: str, things: str) -> WordProblem:
    a, b = rng.randint(5, 40), rng.randint(3, 30)
    problem = f"{name} has {a} {things} and buys {b} more. How many {things} does {name} have now?"
    return _made(problem, f"{name} starts with {a} {things} and buys {b}, so {name} has {a} + {b}", a + b, things)


def gave(rng: random.Random, name: str, things: str) -> WordProblem:
    a = rng.randint(8, 50)
    b = rng.randint(2, a - 1)
    problem = f"{name} has {a} {things} and gives {b} of them away. How many {things} does {name} have left?"
    return _made(problem, f"{name} starts with {a} {things} and gives away {b}, so {name} has {a} - {b}", a - b, things)


def boxes(rng: random.Random, name: str, things: str) -> WordProblem:
    a, b = rng.randint(2, 9), rng.randint(2, 12)
    problem = f"{name} has {a} boxes with {b} {things} in each box. How many {things} does {name} have?"
    return _made(problem, f"There are {a} boxes and each has {b} {things}, so {name} has {a} * {b}", a * b, things)


def price(rng: random.Random, name: str, things: str) -> WordProblem:
    a, b = rng.randint(2, 12), rng.randint(2, 9)
    problem = f"{name} buys {b} {things} that cost {a} dollars each. How many dollars does {name} pay?"
    return _made(problem, f"Each costs {a} dollars and {name} buys {b}, so {name} pays {a} * {b}", a * b, "dollars")


KINDS: tuple[Callable[[random.Random, str, str], WordProblem], ...] = (bought, gave, boxes, price)


def word_problems(count: int, seed: int, *, apart_from: frozenset[str] = frozenset()) -> list[WordProblem]:
    """``count`` different problems, the four kinds in turn; none whose text is in ``apart_from``."""
    rng = random.Random(seed)
    problems: list[WordProblem] = []
    seen = set(apart_from)
    while len(problems) < count:
        made = KINDS[len(problems) % len(KINDS)](rng, rng.choice(NAMES), rng.choice(THINGS))
        if made.problem not in seen:
            seen.add(made.problem)
            problems.append(made)
    return problems

"""Do answers keep the length that was asked for? (LIFT, https://arxiv.org/abs/2406.17744, §4)

A response violates its limit when it has more words (`data.lift.words`). In the win rate against a
baseline a violation loses whatever a judge would say; the judge sees the prompt without its limit.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from jaxlm.data.lift import words

SCALES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)

Judge = Callable[[str, str, str], float]
"""(prompt without a limit, response, baseline) -> 1 = the response wins, 0 = it loses, 0.5 tie."""


class Limited(NamedTuple):
    """A prompt, the limit in words that came with it, and what a good answer looked like."""

    prompt: str  # without the limit
    limit: int
    baseline: str = ""


class Kept(NamedTuple):
    """How limits were kept, over all prompts."""

    violations: float  # share
    words: float  # mean
    share_of_limit: float  # mean of words / limit: what was used of what was allowed
    wins: float | None  # share; None without a judge


def kept(
    asked: Sequence[Limited],
    responses: Sequence[str],
    judge: Judge | None = None,
    count: Callable[[str], int] = words,
) -> Kept:
    """What became of the limits. Raises `ValueError` unless each prompt has one response."""
    if not asked or len(asked) != len(responses):
        raise ValueError(f"{len(asked)} prompts with {len(responses)} responses cannot be compared")
    sizes = [count(response) for response in responses]
    over = [size > each.limit for size, each in zip(sizes, asked, strict=True)]
    wins = None
    if judge:
        points = [
            0.0 if violated else judge(each.prompt, response, each.baseline)
            for each, response, violated in zip(asked, responses, over, strict=True)
        ]
        wins = sum(points) / len(points)
    share = sum(size / each.limit for size, each in zip(sizes, asked, strict=True)) / len(sizes)
    return Kept(sum(over) / len(over), sum(sizes) / len(sizes), share, wins)


def scaled(asked: Sequence[Limited], scale: float) -> list[Limited]:
    """The same prompts with every limit times `scale`, at least one word: the paper's stress."""
    return [each._replace(limit=max(1, round(each.limit * scale))) for each in asked]

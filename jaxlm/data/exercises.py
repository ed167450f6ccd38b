# ruff: noqa: SIM905  (lists of names read better as text)
"""A built-in corpus of short exercises: questions about words and numbers that have one answer.

For trying fine-tuning and preferences out without a download: a small model learns them in minutes,
and each answer can be checked. Made from a fixed list of words and a fixed seed, so they are the
same everywhere. A wrong answer is the right one with one slip, of a letter, a digit or the order.

format chat      {"messages": ...}, some of two turns    pairs    prompt, chosen, rejected
feedback         pairs taken apart
"""

import functools
import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

from jaxlm.data.documents import Document, Tally
from jaxlm.data.examples import canonical

COUNT = 6000  # questions
TURNS = 0.25  # share of the conversations in which the user asks for the answer again
AGAIN = "Say that again."  # and no other exercise, which may be a held-out one

WORDS = (
    "apple bread chair dance eagle flame grape house island juice knife lemon mouse night ocean "
    "piano queen river stone table uncle voice water youth zebra amber beach cloud dream earth "
    "field glass heart ivory jewel koala light magic north olive peach quilt robin shelf tiger "
    "urban viola whale yacht angel brick crown drift ember frost giant honey image jelly karma"
).split()


class Exercise(NamedTuple):
    """A question, its answer, and an answer with a slip."""

    question: str
    right: str
    wrong: str


def _upper(rng: random.Random) -> tuple[str, str]:
    word = _word(rng)
    return f"Write {word} in capitals.", word.upper()


def _last(rng: random.Random) -> tuple[str, str]:
    words = [_word(rng) for _ in range(3)]
    return f"Which word comes last: {', '.join(words)}?", words[-1]


def _spell(rng: random.Random) -> tuple[str, str]:
    word = _word(rng)
    return f"Spell {word}.", "-".join(word)


def _add(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(0, 49), rng.randint(0, 49)
    return f"What is {a} + {b}?", str(a + b)


KINDS: tuple[Callable[[random.Random], tuple[str, str]], ...] = (_upper, _last, _spell, _add)


def _word(rng: random.Random) -> str:
    """A word of the list, or two joined halves of such words, so that there are many."""
    a, b = rng.choice(WORDS), rng.choice(WORDS)
    return a if rng.random() < 0.2 else a[:3] + b[2:]


def slip(answer: str, rng: random.Random) -> str:
    """The answer with one letter or digit changed, or two neighbours exchanged; another text."""
    while True:
        at = rng.randrange(len(answer))
        if answer[at].isdigit():
            other = str(rng.randint(0, 9))
            found = answer[:at] + other + answer[at + 1 :]
        elif answer[at].isalpha() and rng.random() < 0.5:
            other = rng.choice("abcdefghijklmnopqrstuvwxyz")
            other = other.upper() if answer[at].isupper() else other
            found = answer[:at] + other + answer[at + 1 :]
        else:
            found = answer[:at] + answer[at : at + 2][::-1] + answer[at + 2 :]
        if found != answer and found[0] != "0":
            return found


@functools.cache
def exercises() -> tuple[Exercise, ...]:
    """All of them, each question once."""
    rng, found = random.Random(0), {}
    while len(found) < COUNT:
        question, right = KINDS[len(found) % len(KINDS)](rng)
        found.setdefault(question, Exercise(question, right, slip(right, rng)))
    return tuple(found.values())


def fingerprint() -> list:
    """What the corpus depends on: this file, whose content is part of every key anyway."""
    return ["exercises", COUNT]


def rows(form: str, tally: Tally) -> Iterator[Document]:
    """The rows, as JSON."""
    rng = random.Random(1)
    for i, each in enumerate(exercises()):
        tally.rows += 1
        if form == "chat":
            again = _turn(AGAIN, each.right) if rng.random() < TURNS else []
            row = {"messages": [*_turn(each.question, each.right), *again]}
        else:
            row = {"prompt": each.question, "chosen": each.right, "rejected": each.wrong}
        yield Document(f"exercises/{i}", canonical(row))


def _turn(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

"""LIFT (https://arxiv.org/abs/2406.17744): preference triples -> pairs that obey a length limit.

Each triple whose two responses differ by at least `margin` words gives two pairs more, after a
prompt that states a limit: one that both responses keep (the longer one's words + 10), where the
order stays, and one drawn strictly between the two lengths, where the shorter one wins. So a pair
is turned round exactly when its winner is the longer one and the limit lies between. A limit that
both break is never drawn. The paper's headline model trains on the originals and these together.

A word is a run of letters and digits; a contraction counts as two ("do n't"), as in the NLTK
tokenizer that the paper counts with, and punctuation does not count. Unlike there, "..." and
quotation marks count as nothing, and "cannot" and "gonna" as one.
"""

import random
import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

INSTRUCTION = "Answer the following instruction using {limit} words or less.\n\n{prompt}"
ABOVE = 10  # words of room in the limit that both keep

_WORD = re.compile(r"\w+(?:(?:[-./'’]|[,:](?=\d))\w+)*")
_CONTRACTED = re.compile(r"(?<=\w)(?:n['’]t|['’](?:s|m|d|ll|re|ve))\b", re.IGNORECASE)


class Triple(NamedTuple):
    """A prompt and two responses, the preferred one first."""

    prompt: str
    chosen: str
    rejected: str


def words(text: str) -> int:
    """How many words a text has, as the module says."""
    contractions = len(_CONTRACTED.findall(text))
    return len(_WORD.findall(_CONTRACTED.sub(" ", text))) + contractions


def instructed(prompt: str, limit: int) -> str:
    """The prompt with a limit stated before it, in the paper's one wording."""
    return INSTRUCTION.format(limit=limit, prompt=prompt)


def limited(
    triple: Triple, seed: int = 0, margin: int = 10, count: Callable[[str], int] = words
) -> list[Triple]:
    """The two pairs that a triple gives, or none where its lengths are too near.

    The limit between follows from the seed and the triple's text alone, in whatever order triples
    come. Raises `ValueError` for a margin below 2, which leaves nothing in between.
    """
    if margin < 2:
        raise ValueError(f"margin={margin} leaves no limit between two lengths; use 2 or more")
    prompt, chosen, rejected = triple
    sizes = count(chosen), count(rejected)
    short, long = min(sizes), max(sizes)
    if long - short < margin:
        return []
    between = random.Random(f"{seed}\n{prompt}\n{chosen}\n{rejected}").randint(short + 1, long - 1)
    first, second = (chosen, rejected) if sizes[0] == short else (rejected, chosen)
    return [
        Triple(instructed(prompt, long + ABOVE), chosen, rejected),
        Triple(instructed(prompt, between), first, second),
    ]


def lift(
    triples: Iterable[Triple], *, seed: int = 0, margin: int = 10, originals: bool = True
) -> Iterator[Triple]:
    """Every triple (but for `originals=False`), each followed by the pairs that it gives."""
    for triple in triples:
        if originals:
            yield triple
        yield from limited(triple, seed, margin)

"""What documents say in common, line by line: cheap, and enough for text that was copied.

Used by the built-in corpora, whose topics contain one another and whose modules were sometimes
written by copying. White space around a line does not count, nor do short lines.
"""

import collections
from collections.abc import Iterator

from jaxlm.data.documents import Document

LINE = 20  # characters; shorter lines repeat everywhere and say nothing
SHARED = 0.1  # share of a held-out document's characters in lines that other groups have too
REPEATED = 0.6  # share beyond which a document repeats earlier ones and is dropped


def _lines(text: str) -> Iterator[str]:
    for line in text.splitlines():
        stripped = line.strip()
        if len(stripped) >= LINE:
            yield stripped


def shared_with(text: str, known: set[str]) -> float:
    """Share of the characters of a text's longer lines that stand in lines of `known`."""
    lines = list(_lines(text))
    return sum(len(x) for x in lines if x in known) / max(1, sum(map(len, lines)))


def without_repeats(documents: list[Document]) -> tuple[list[Document], int]:
    """Drops a document most of which earlier ones already said; how many were dropped."""
    known: set[str] = set()
    kept = []
    for document in documents:
        if shared_with(document.text, known) <= REPEATED:
            kept.append(document)
            known.update(_lines(document.text))
    return kept, len(documents) - len(kept)


def held_out_groups(groups: dict[int, list[Document]], share: float) -> set[int]:
    """The groups of the smallest hashes, `share` of all documents, without those of which another
    group has a part: whichever side that one is on, training would give it away.
    """
    owners: collections.Counter[str] = collections.Counter()
    for documents in groups.values():
        owners.update({line for document in documents for line in _lines(document.text)})
    common = {line for line, count in owners.items() if count > 1}
    wanted = share * sum(map(len, groups.values()))
    held: set[int] = set()
    for key in sorted(groups):
        if wanted <= 0:
            break
        if all(shared_with(document.text, common) <= SHARED for document in groups[key]):
            held.add(key)
            wanted -= len(groups[key])
    return held

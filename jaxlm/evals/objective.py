"""Held-out conversations, preferences and feedback, scored by the objective that is trained.

Figures are `loss/<source>` and `<metric>/<source>` of each metric that the method reports, over all
held-out records: summed, and divided once by what each is summed with. Without dropout. Records
that fill up the last batch are padding and weigh nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxlm.data.batches import Gather
from jaxlm.data.prepare import PreparedSource


class ByObjective:
    """Scores params on the held-out records of every source; compiles one program, once.

    `score(params, extras, batch)` gives the loss and each metric as a sum with its weight
    (`step.make_score`); `zeros(rows)` is a batch of padding. `characters`: of each source, at most.
    `beside` gives a batch more fields, as in training.
    """

    def __init__(
        self,
        score: Any,  # jitted
        sources: Sequence[PreparedSource],
        *,
        batch: int,
        zeros: Callable[[int], dict[str, np.ndarray]],
        put: Callable,
        characters: int,
        beside: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] = lambda batch: {},
    ):
        self._beside = beside
        self._score, self._put, self._zeros = score, put, zeros(batch)
        # A source's number is its place in the mixture, as in training.
        self._sources = [(i, s) for i, s in enumerate(sources) if s.held_out_rows]
        self._rows = {s.name: rows_of(s, characters) for _, s in self._sources}

    @property
    def rows(self) -> int:
        """Of all sources; 0 = there is nothing to score."""
        return sum(self._rows.values())

    def compile(self, params, extras) -> None:
        """Compiles the program, and runs nothing yet."""
        if self.rows:
            self._score.lower(params, extras, self._put(self._zeros)).compile()

    def figures(self, params, extras, tick=lambda done, total: None) -> dict[str, float]:
        """The figures of all sources; NaN for what nothing weighs in."""
        found, done = {}, 0
        for number, source in self._sources:
            sums: dict[str, np.ndarray] = {}
            gather = Gather([source], held_out=True)
            for first in range(0, self._rows[source.name], size := len(self._zeros["index"])):
                last = min(first + size, self._rows[source.name])
                batch = padded(self._zeros, gather(np.arange(first, last)), number)
                batch |= self._beside(batch)
                for name, both in self._score(params, extras, self._put(batch)).items():
                    sums[name] = sums.get(name, 0.0) + np.array(both, np.float64)
                done += last - first
                tick(done, self.rows)
            for name, (value, weight) in sums.items():
                found[f"{name}/{source.name}"] = float(value / weight) if weight else float("nan")
        return found


def rows_of(source: PreparedSource, characters: int) -> int:
    """How many of a source's held-out rows are scored: as many as hold that many characters."""
    most = sum(len(document.text) for document in source.held_out)
    return max(1, min(source.held_out_rows, source.held_out_rows * characters // max(most, 1)))


def padded(zeros: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray], number: int):
    """A batch of the rows found, their `index` as in `data.batches.in_order`, and then padding."""
    batch = {name: value.copy() for name, value in zeros.items()}
    rows = len(found["index"])
    for name, value in found.items():
        batch[name][:rows] = value
    batch["index"][:rows] = -1 - found["index"]
    batch["source"][:] = number
    return batch

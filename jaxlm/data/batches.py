"""Prepared records -> the batches of one host, from any position on.

Grain carries indices only: per source seed, shuffle, repeat; then one selection map for the mixture
and for the rows of this host, in the order that they have in each global batch. The records of a
batch are read in one call a source and decoded together, so the cost per row stays small at any
length.
"""

import itertools
import zlib
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np

from jaxlm.data import conversations, mix
from jaxlm.data.prepare import Prepared, PreparedSource
from jaxlm.data.records import Reader

ENDLESS = 2**40  # rows; Grain wants a length


class HostRows(grain.transforms.DatasetSelectionMap):
    """This host's i-th row since `position` -> (source, row number in its shuffled epochs).

    It takes the rows `mine` of every global batch, so that the batch put together from all hosts
    is the one that a single host would have.
    """

    def __init__(
        self,
        schedule: mix.Schedule,
        sources: Sequence[PreparedSource],
        rows: int,
        position: int,
        mine: Sequence[int],
    ):
        self._schedule, self._sources, self._limits = schedule, sources, mix.limits(sources)
        self._rows, self._position, self._mine = rows, position, mine

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> tuple[int, int]:
        batch, i = divmod(index, len(self._mine))
        source, taken = self._schedule[self._position + batch * self._rows + self._mine[i]]
        limit = self._limits[source]
        if limit is not None and taken >= limit:
            found = self._sources[source]
            raise ValueError(
                f"source {found.name!r} is used up: max_epochs={found.max_epochs:g} allows "
                f"{limit:,} of its rows. Train fewer steps, lower its weight, or raise max_epochs."
            )
        return source, taken


class Gather:
    """Rows of all sources, numbered through -> a batch; one read a source."""

    def __init__(
        self,
        sources: Sequence[PreparedSource],
        attend_across_documents: bool = False,
        held_out: bool = False,
    ):
        files = [source.held_out_records if held_out else source.records for source in sources]
        counts = (source.held_out_rows if held_out else source.rows for source in sources)
        self._readers = [Reader(each) for each in files]
        self._first = np.cumsum([0, *counts])
        self._format = sources[0].format
        self._dtype = np.dtype(sources[0].dtype)
        self._length = sources[0].length
        self._attend = attend_across_documents

    def __call__(self, numbers: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        source_B = np.searchsorted(self._first, numbers, side="right") - 1
        index_B = numbers - self._first[source_B]
        records: list[bytes] = [b""] * len(numbers)
        for source in np.unique(source_B):
            at = np.flatnonzero(source_B == source)
            found = self._readers[source].read(index_B[at].tolist())
            for i, record in zip(at, found, strict=True):
                records[i] = record
        fields = conversations.to_batch(
            records, self._format, self._length, self._dtype, self._attend
        )
        return fields | {
            "source": source_B.astype(np.int32),
            "index": index_B.astype(np.int32),
        }


def in_order(
    prepared: Prepared,
    source: int,
    rows: int,
    attend_across_documents: bool = False,
    held_out: bool = False,
    begin: int = 0,
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """(first record, batch) for every record of a source once; the last one fills its batch up.
    `begin`: with that record instead of the first.

    A held-out record's `index` is -1 - its number, so that nobody takes it for the one of that
    number that is trained on.
    """
    found = prepared.sources[source]
    gather = Gather([found], attend_across_documents, held_out)
    count = found.held_out_rows if held_out else found.rows
    for first in range(begin, count, rows):
        numbers = np.minimum(np.arange(first, first + rows), count - 1)
        batch = gather(numbers.tolist()) | {"source": np.full(rows, source, np.int32)}
        yield first, batch | ({"index": -1 - batch["index"]} if held_out else {})


def _shuffled(source: PreparedSource, first: int, seed: int) -> grain.MapDataset:
    """The numbers of a source's rows, another permutation each epoch, whatever else is mixed."""
    own_seed = (seed + zlib.crc32(source.name.encode())) % 2**32
    return grain.MapDataset.range(first, first + source.rows).seed(own_seed).shuffle().repeat()


def batches(
    prepared: Prepared,
    *,
    rows: int,
    position: int,
    seed: int,
    stages: Sequence[mix.Stage] = (),
    attend_across_documents: bool = False,
    mine: Sequence[int] | None = None,
    beside: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] | None = None,
    threads: int = 1,
    prefetch: int = 4,
) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches of the rows that this host needs, from row `position` on.

    `rows` is the global batch, `mine` the numbers of its rows to give; None = all. After n batches
    the position is `position + n * rows`, whatever the number of hosts; nothing else has to be
    stored. `stages` come from `mix.parse_stages`, empty = the weights of the sources. `beside`
    gives a batch more fields. A thread prepares up to `prefetch` batches ahead; 0 threads = none.
    """
    mine = range(rows) if mine is None else [int(row) for row in mine]
    if not mine or min(mine) < 0 or max(mine) >= rows:
        raise ValueError(f"a batch of {rows} rows has no rows {list(mine)}")
    names = [source.name for source in prepared.sources]
    weights = {source.name: source.weight for source in prepared.sources}
    schedule = mix.Schedule(stages or mix.parse_stages("", weights, 0), names)
    chosen = HostRows(schedule, prepared.sources, rows, position, mine)
    firsts = itertools.accumulate((source.rows for source in prepared.sources), initial=0)
    shuffled = [_shuffled(*each, seed) for each in zip(prepared.sources, firsts, strict=False)]
    mixed = grain.MapDataset.select_from_datasets(shuffled, chosen)
    gather = Gather(prepared.sources, attend_across_documents)
    batched = mixed.batch(len(mine), batch_fn=gather)
    if beside:
        batched = batched.map(lambda batch: batch | beside(batch))
    options = grain.ReadOptions(
        num_threads=threads, prefetch_buffer_size=prefetch if threads else 0
    )
    return iter(batched.to_iter_dataset(options))

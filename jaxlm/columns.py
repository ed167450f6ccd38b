"""What a batch has next to its records: routes by source, and columns that frozen models gave.

A column is computed once, in one pass over the records of every source, and kept in the cache
folder under a hash of all that it depends on: the params (`fingerprint`), the model's options, the
records, the knobs, the code that makes the numbers. What does not match is never read: it has
another name. Each field is one .npy file a source, [records, ...], of which a batch reads its rows;
held-out records, whose index is negative, lie at its end. A pass that was cut off, by kill -9 too,
leaves nothing that is read; in a single process the next one goes on from its last mark, if all
that decides the bits is the same, else anew, as several processes do.
"""

import contextlib
import functools
import hashlib
import inspect
import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlm import sharding
from jaxlm.build import Built
from jaxlm.checkpoint import Checkpoints
from jaxlm.data.batches import in_order
from jaxlm.data.cache import cached, check, left_bytes
from jaxlm.data.documents import Progress
from jaxlm.data.prepare import Prepared
from jaxlm.data.rowfile import RowFile
from jaxlm.files import write_atomically
from jaxlm.fingerprint import fingerprint
from jaxlm.host import cluster

Fields = Mapping[str, np.ndarray]
Beside = Callable[[Fields], dict[str, np.ndarray]]

MARK = "mark.json"  # in an unfinished folder: how many records are on the disk
MARK_SECONDS = 10.0  # between two marks, each of which waits for the disk


def routed(built: Built, prepared: Prepared) -> Beside:
    """(batch) -> the fields of `Method.routes`."""
    names = [source.name for source in prepared.sources]
    ones = {
        field: np.array([name in chosen for name in names], np.float32)
        for field, chosen in built.run.method.routes.items()
    }
    return lambda batch: {field: one[batch["source"]] for field, one in ones.items()}


def joined(*beside: Beside) -> Beside:
    """The fields of all."""
    return lambda batch: {k: v for one in beside for k, v in one(batch).items()}


def ready(
    built: Built,
    prepared: Prepared,
    checkpoints: Checkpoints,
    params: Any,
    *,
    cache: Path,
    writers: Sequence[bool],
    say: Callable[[str], None],
    progress: Progress,
) -> Beside:
    """(batch) -> the fields of `Method.columns`, computed before unless they are in the cache.

    `params`: those that the run starts from, or None where it is continued: then the columns are of
    the models that it started with. `writers`: whether each process keeps them in a cache of its
    own. Raises `ValueError` where that cannot be.
    """
    method, known = built.run.method, checkpoints.noted_once().get("fingerprints", {})
    found = []
    for name in method.columns:
        get = lambda name=name: _params(built, name, params)
        mine = get() if params is not None else None
        known = known | ({name: fingerprint(mine)} if mine is not None else {})
        if name not in known:
            raise ValueError(
                f"{checkpoints.directory} does not say which model {name!r} was computed with: it "
                "was written before this method had it; start again in another --config.workdir"
            )
        folder = cache / "columns" / _key(built, prepared, name, known[name])
        work = _Pass(built, prepared, name, folder, say, progress)
        missing = cluster.share(writers[cluster.process()] and check(folder)[0] is None)
        if any(missing):
            work.refuse_size()
            mine = get() if mine is None else mine
            if fingerprint(mine) != known[name]:
                raise ValueError(
                    f"the cache no longer holds {name!r} ({folder}), and the model that this run "
                    "started with cannot be made again: its folder, --config.init.* or the code "
                    "has changed; put it back, or start again in another --config.workdir"
                )
            work.run(mine, writes=writers[cluster.process()])
            cluster.share()  # nobody reads before it is whole
        del mine
        found.append(work.reader())
    if params is not None and method.columns:
        checkpoints.note_once({"fingerprints": known})
    return joined(*found)


def _params(built, name, params):
    """The params of a column's model."""
    if name in built.stored:
        return built.load_other(name)
    return built.start_params() if params is None else params


def _key(built, prepared, name, print_):
    column = built.run.method.columns[name]
    options = built.stored[name].options if name in built.stored else built.run.model
    shapes = {k: (v.shape, str(v.dtype)) for k, v in built.column_fields(name).items()}
    attend = built.run.data.attend_across_documents
    parts = (print_, options, prepared.hash, attend, name, column.about, shapes, code(column.fn))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:20]


def code(fn: Callable) -> str:
    """Hash of the files that make a column's numbers: its own, and what all of them go through."""
    here = Path(__file__).parent
    names = "columns.py", "data/batches.py", "data/conversations.py", "models/*.py"
    shared = "methods/likelihood.py", "methods/responses.py"
    files = {file for name in (*names, *shared) for file in here.glob(name)}
    while isinstance(fn, functools.partial):
        fn = fn.func
    files.add(Path(inspect.getfile(inspect.unwrap(fn))))
    content = [(file.name, hashlib.sha256(file.read_bytes()).hexdigest()) for file in sorted(files)]
    return hashlib.sha256(repr(content).encode()).hexdigest()


class _Pass:
    """One pass over all records of all sources with one model."""

    def __init__(self, built: Built, prepared: Prepared, name: str, folder: Path, say, progress):
        self.built, self.prepared, self.name, self.folder = built, prepared, name, folder
        self.say, self.progress = say, progress
        self.fields = built.column_fields(name)

    def refuse_size(self) -> None:
        """Tells what the column takes on disk. Raises `ValueError` if that is too much."""
        each = sum(x.dtype.itemsize * x.size for x in self.fields.values())
        size = each * sum(map(_records, self.prepared.sources))
        limit = self.built.run.method.columns[self.name].limit_gb
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder.parent).free + left_bytes(self.folder)
        text = f"{self.name!r} of every record takes {size / 1e9:.3g} GB in {self.folder.parent}"
        if size > limit * 1e9:
            raise ValueError(
                f"{text}, and its limit is {limit:g} GB: take fewer or shorter records, or let the "
                "method keep less of each, allow it more, or read its model live, where it can"
            )
        if size > 0.95 * free:
            raise ValueError(
                f"{text}, where {free / 1e9:.3g} GB are free; free some space, set XDG_CACHE_HOME "
                "to a folder on another disk, or keep less of it"
            )
        self.say(f"  {text}")

    def run(self, params, *, writes: bool) -> None:
        """Computes every field. All processes take part; those that write keep it."""
        batches = self._batches(params)

        def build(at):
            nonlocal batches
            if done := self._marked(at):
                self.say(f"  going on behind record {done:,}, where a pass was cut off")
                batches = self._batches(params, done)
            return self._write(at, batches, done)

        several = cluster.several()
        if writes:
            # Several would have to agree where to go on. And while a writer waited for another
            # run's, its fellows would wait for it in a batch, and that run's perhaps for them.
            cached(
                self.folder, self.name, build, self.progress, goes_on=not several, waits=not several
            )
        if several:  # what this process does not write, or another run has written meanwhile
            for _ in batches:
                pass

    @property
    def _rows(self) -> int:
        """Of a batch: as many as a step has in memory at one time."""
        return self.built.run.batch // self.built.run.accumulate

    def _batches(self, params, begin: int = 0) -> Iterator[tuple[int, np.ndarray, Fields]]:
        """(source, index of records, their fields); held-out records count from the end.

        `begin`: behind so many records, which end a batch.
        """
        mesh, rows = self.built.mesh, self._rows
        fn, _ = self.built.column(self.name)
        program = jax.jit(fn, out_shardings=sharding.replicated(mesh))
        attend = self.built.run.data.attend_across_documents
        total, done = sum(map(_records, self.prepared.sources)), 0
        for number, source in enumerate(self.prepared.sources):
            for held_out in (False, True):
                there = source.held_out_rows if held_out else source.rows
                skipped = max(0, min(there, begin - done))
                done += skipped
                if skipped == there:
                    continue
                records = in_order(self.prepared, number, rows, attend, held_out, skipped)
                for first, batch in records:
                    fields = program(params, self.built.put_whole(batch))
                    count = min(rows, there - first)
                    found = {k: np.asarray(v)[:count] for k, v in fields.items()}
                    yield number, batch["index"][:count], found
                    done += count
                    self.progress(done, total, f"{self.name}: record {done:,} of {total:,}")

    def _files(self, at: Path, *, there: bool) -> dict[tuple[int, str], RowFile]:
        """(source, field) -> its file, which is made unless it is `there`."""
        return {
            (number, field): RowFile(
                at / _file(number, field),
                np.dtype(x.dtype),
                (_records(source), *x.shape),
                there=there,
            )
            for number, source in enumerate(self.prepared.sources)
            for field, x in self.fields.items()
        }

    def _made_by(self) -> str:
        """What decides the bits besides the name of the folder."""
        mesh = self.built.mesh
        kind = mesh.devices.flat[0].device_kind
        return repr((self._rows, dict(mesh.shape), kind, jax.__version__))

    def _marked(self, at: Path) -> int:
        """How many records stand in an unfinished folder; 0 if they are of no use."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            mark = json.loads((at / MARK).read_text())
            if mark["by"] == self._made_by():
                self._files(at, there=True)
                return int(mark["records"])
        return 0

    def _write(self, at: Path, batches, done: int) -> dict:
        """Behind the first `done` records, which are there."""
        if not done:
            for path in at.iterdir():
                path.unlink()
        files, marked = self._files(at, there=bool(done)), time.monotonic()
        for number, of_source in itertools.groupby(batches, key=lambda found: found[0]):
            with contextlib.ExitStack() as stack:
                write = {
                    field: stack.enter_context(files[number, field].open()) for field in self.fields
                }
                for _, index, fields in of_source:
                    for field, values in fields.items():
                        write[field](index, values)
                    done += len(index)
                    if time.monotonic() - marked >= MARK_SECONDS:
                        for field in self.fields:
                            files[number, field].sync()
                        mark = {"records": done, "by": self._made_by()}
                        write_atomically(at / MARK, json.dumps(mark))
                        marked = time.monotonic()
        (at / MARK).unlink(missing_ok=True)
        return {"fields": sorted(self.fields), "sources": len(self.prepared.sources)}

    def reader(self) -> Beside:
        """(batch) -> the fields of its records."""
        opened = {
            (number, field): np.load(self.folder / _file(number, field), mmap_mode="r")
            for number in range(len(self.prepared.sources))
            for field in self.fields
        }

        def read(batch):
            source_B, index_B = batch["source"], batch["index"]
            found = {}
            for field, like in self.fields.items():
                out = np.empty((len(source_B), *like.shape), like.dtype)
                for number in np.unique(source_B):
                    at = source_B == number
                    out[at] = opened[int(number), field][index_B[at]]
                found[field] = out
            return found

        return read


def _records(source):
    """To train on and held out."""
    return source.rows + source.held_out_rows


def _file(number, field):
    return f"{number:03}-{field}.npy"

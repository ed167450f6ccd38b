"""Checkpoints: saved in the background, checked before they are trusted.

    with Checkpoints(workdir / "checkpoints", keep=2, keep_best="loss") as checkpoints:
        checkpoints.save(step, {"params": params, "opt_state": opt_state}, about, {"loss": 1.2})
        ...
        step = checkpoints.latest()
        trees = checkpoints.restore(step, {"params": abstract})  # any mesh, any subset of items

A checkpoint is a folder named by its step: its trees of arrays (`storage`) and a digest (`digest`)
that makes it count. Old ones are removed only after the new one has its digest.

Several processes write and hash a checkpoint together, into one folder that all of them see; what
is done to whole folders process 0 does alone, and all agree on which checkpoints are good. All call
the same functions in the same order.
"""

import contextlib
import json
import math
import pathlib
import shutil
import threading
import traceback
from collections.abc import Callable, Collection, Mapping
from typing import Any

from jaxlm.checkpoint import digest as digests
from jaxlm.checkpoint import storage
from jaxlm.checkpoint.digest import Damaged
from jaxlm.checkpoint.storage import SaveError
from jaxlm.files import write_atomically
from jaxlm.host import cluster
from jaxlm.host.fellows import CRASHED


class Checkpoints:
    """The checkpoints of one run, in one folder.

    Keeps the newest `keep` and, with `keep_best`, the one whose metric of that name is lowest, or
    with `highest` the one where it is highest.
    `verify` compares the hash of every file, or only their `sizes` (for checkpoints of many GB).
    `say` is called with a sentence about each checkpoint that is skipped or moved aside.
    """

    def __init__(
        self,
        directory: str | pathlib.Path,
        *,
        keep: int = 2,
        keep_best: str = "",
        highest: bool = False,
        verify: str = "full",
        say: Callable[[str], None] = print,
    ):
        if verify not in ("full", "sizes"):
            raise ValueError(f"checkpoint.verify is {verify!r}; it may be 'full' or 'sizes'")
        if keep < 1:
            raise ValueError(f"checkpoint.keep is {keep}; at least 1 checkpoint must be kept")
        self.directory = pathlib.Path(directory).absolute()
        self.keep, self.keep_best, self.verify, self.say = keep, keep_best, verify, say
        self._sign = -1 if highest else 1
        self._at: int | None = None  # the step that was saved or restored last
        self._tidied = False
        self._metrics: dict[int, dict[str, float]] = {}  # of the steps known to be good
        self._saving: dict[int, dict[str, float]] = {}  # of the one that is or was written last
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def __enter__(self):
        return self

    def __exit__(self, kind, value, traceback):
        try:
            if kind is not None and cluster.several():  # the others do not know yet: cannot agree
                self._join()
            else:
                self.wait()
        except Exception as error:
            if kind is None:
                raise
            what = "" if isinstance(error, SaveError) else "the last checkpoint was not saved: "
            self.say(f"{what}{error}")  # the exception on its way out comes first

    def save(
        self,
        step: int,
        items: Mapping[str, Any],
        about: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Saves trees of arrays in the background; the arrays may be donated as soon as it returns.

        Waits for the save before, and raises its `SaveError`. `about` is kept as JSON. A step just
        saved or restored is not saved again. Whatever else stands at this step or later (damaged,
        or left by a run that was taken back) moves aside.
        """
        self.wait()
        if step == self._at:
            return
        if not self._tidied:
            storage.remove_leftovers(self.directory)
            self._tidied = True
        self._move_aside(step)
        cluster.share()  # nobody writes before process 0 has made room
        folder = self.directory / str(step)
        record = storage.record(step, items, about, metrics or {})
        response = storage.start(folder, items)

        def finish():
            try:
                storage.finish(response, folder, record)
                if not cluster.several():  # otherwise good only once all digests are there
                    self._metrics[step] = record.metrics
                self._prune()
            except Exception as error:  # raised again by wait()
                self._error = error
                if cluster.several():  # no other process would come to it: their saves wait for us
                    _end_all(error)

        self._at, self._saving = step, {step: record.metrics}
        self._thread = threading.Thread(target=finish, name=f"checkpoint {step}")
        self._thread.start()

    def wait(self) -> None:
        """Returns when the last save has its digest on disk. Raises `SaveError` if it failed."""
        if self._join():
            _complete(*(self.directory / str(step) for step in self._saving))
            self._metrics |= self._saving

    def _join(self):
        """Whether there was a save to wait for."""
        waited = self._thread is not None
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error, self._at = self._error, None, None
            raise error
        return waited

    def inspect(self) -> dict[int, str]:
        """Every checkpoint here -> why it cannot be used; "" = it can. The processes share the work
        of finding out."""
        steps = cluster.broadcast(_numbered(self.directory))
        mine = [self._problem(step, cluster.process(), cluster.count()) for step in steps]
        found = dict(
            zip(steps, map(cluster.first, zip(*cluster.share(mine), strict=True)), strict=True)
        )
        for step in [s for s, problem in found.items() if problem]:
            self._metrics.pop(step, None)
        return found

    def steps(self) -> list[int]:
        """The steps whose checkpoints verify, in order; says which others are skipped, and why."""
        self.wait()
        found = self.inspect()
        return [step for step, problem in found.items() if not self._told(step, problem)]

    def is_good(self, step: int, items: Collection[str]) -> bool:
        """Whether what there is of these items verifies; says why not. The processes share the
        work."""
        problem = self._problem(step, cluster.process(), cluster.count(), items)
        return not self._told(step, cluster.first(cluster.share(problem)))

    def _told(self, step, problem):
        if problem:
            self._metrics.pop(step, None)
            self.say(f"Checkpoint {step} is skipped: {problem} ({self.directory / str(step)}).")
        return problem

    def newest_first(self) -> list[int]:
        """Every step that has a folder here, whatever is in it."""
        return cluster.broadcast(_numbered(self.directory)[::-1])

    def best_first(self) -> list[int]:
        """Those of them whose `keep_best` is known; of equals the one that was kept first."""
        there = self.newest_first()
        for step in there:
            with contextlib.suppress(Damaged):  # told by who reads it
                self._metrics[step] = digests.read(self.directory / str(step)).metrics
        scores = self._scores(there)
        return cluster.broadcast(sorted(scores, key=lambda step: (scores[step], step)))

    def _scores(self, steps):
        """Step -> its `keep_best`, the lower the better, where that is known and a number."""
        of = lambda step: self._metrics.get(step, {}).get(self.keep_best, math.nan)
        return {s: self._sign * of(s) for s in steps if math.isfinite(of(s))}

    def add_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds what was measured of a step after it was saved: it may now be the best one."""
        if not metrics:
            return
        self.wait()
        if cluster.process() == 0:
            digests.add_metrics(self.directory / str(step), metrics)
        self._metrics[step] = self._metrics.get(step, {}) | dict(metrics)
        self._prune()

    def latest(self) -> int | None:
        """The last of `steps()`; None if there is none."""
        return max(self.steps(), default=None)

    def completed(self) -> list[int]:
        """The steps whose checkpoints were once written to their end, damaged since or not."""
        there = _numbered(self.directory)
        return [s for s in there if any((self.directory / str(s)).glob(f"{digests.PREFIX}*.json"))]

    def about(self, step: int) -> dict[str, Any]:
        """What `save` was given as `about`."""
        return storage.read(self.directory / str(step)).about

    def restore(
        self, step: int, abstract: Mapping[str, Any], *, part: bool = False
    ) -> dict[str, Any]:
        """The items named in `abstract`, laid out by the shardings of its leaves.

        `abstract` maps items to trees of `jax.ShapeDtypeStruct`. Raises `ValueError` if their
        names, shapes or dtypes are not those saved; with `part`, a tree may leave arrays out.
        """
        self.wait()
        # `latest` has just checked it whole, several processes each their part.
        verify = "sizes" if step in self._metrics else self.verify
        trees = storage.load(self.directory / str(step), abstract, verify, part)
        self._at = step
        return trees

    def save_once(self, name: str, tree: Any) -> None:
        """Saves a tree that belongs to the start of the run, such as a frozen reference; waits."""
        folder = self.directory / "once" / name
        storage.remove_leftovers(folder.parent)
        if cluster.process() == 0:
            shutil.rmtree(folder, ignore_errors=True)
        cluster.share()
        items = {name: tree}
        storage.finish(storage.start(folder, items), folder, storage.record(0, items, {}, {}))
        _complete(folder)
        cluster.share()

    def restore_once(self, name: str, abstract: Any) -> Any:
        """What `save_once` saved; the processes share the work of verifying it.

        Raises `ValueError` if it is missing or damaged."""
        folder = self.directory / "once" / name
        try:
            if damage := cluster.first(cluster.share(self._damage(folder))):
                raise Damaged(f"{folder} cannot be used: {damage}")
            return storage.load(folder, {name: abstract}, "sizes")[name]
        except Damaged as error:
            raise ValueError(
                f"{error}. It was saved when the run started and cannot be rebuilt from a later "
                "step: put back a copy of that folder, or start again in another workdir"
            ) from None

    def note_once(self, facts: Mapping[str, Any]) -> None:
        """Keeps facts that belong to the start of the run, for `noted_once`."""
        if cluster.process() == 0:
            path = self.directory / "once" / "facts.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(dict(facts), indent=1))
        cluster.share()

    def noted_once(self) -> dict[str, Any]:
        """What `note_once` kept; {} if there is nothing."""
        try:
            return json.loads((self.directory / "once" / "facts.json").read_text())
        except (OSError, ValueError):
            return {}

    def _damage(self, folder):
        """What is wrong with this process's part of the files; "" = nothing."""
        try:
            digests.verify(
                folder, self.verify, process=cluster.process(), processes=cluster.count()
            )
        except (Damaged, OSError) as error:
            return str(error)
        return ""

    def _problem(self, step, process=0, processes=1, items=()):
        try:
            folder, share = self.directory / str(step), {"process": process, "processes": processes}
            found = digests.verify(folder, self.verify, items=items, **share)
            if found.step != step:
                raise Damaged(f"it holds step {found.step}")
        except (Damaged, OSError) as error:
            self._metrics.pop(step, None)
            return str(error)
        self._metrics[step] = found.metrics
        return ""

    def _move_aside(self, step):
        if cluster.process() != 0:
            return
        for later in [s for s in _numbered(self.directory) if s >= step]:
            aside = self.directory / f"{later}.aside"
            shutil.rmtree(aside, ignore_errors=True)
            (self.directory / str(later)).rename(aside)
            self.say(f"Checkpoint {later} was moved aside to {aside}: step {step} is saved anew.")
            self._metrics.pop(later, None)

    def _prune(self):
        """Removes what is older than the newest good ones, but for the best."""
        if cluster.process() != 0:
            return
        there = _numbered(self.directory)
        # Of several processes the others may still be at the digests of the newest one.
        known = lambda s: s in self._metrics or (s not in self._saving and not self._problem(s))
        if not (good := [s for s in there if known(s)]):
            return
        newest = good[-self.keep :]
        scores = self._scores(good)
        best = min(scores, key=scores.__getitem__, default=None)
        old = [s for s in there if s < newest[0] and s != best]
        aside = [s for s in _numbered(self.directory, ".aside") if s < newest[0]]
        for name in [str(s) for s in old] + [f"{s}.aside" for s in aside]:
            gone = (self.directory / name).rename(self.directory / f"{name}.deleting")
            shutil.rmtree(gone, ignore_errors=True)


def find(
    path: str | pathlib.Path,
    *,
    step: int | None = None,
    best: tuple[str, bool] | None = None,
    verify: str = "full",
    items: Collection[str] = (),
    say: Callable[[str], None] = print,
) -> tuple[pathlib.Path, bool]:
    """The folder of the newest good checkpoint, or of `step`, or the `best` by (metric, whether the
    highest is), and whether it was verified already: `items`, () = all.

    `path` is a work folder, a folder of checkpoints, or one checkpoint.

    Raises `ValueError` if there is none.
    """
    path = pathlib.Path(path).absolute()
    if not path.is_dir():
        raise ValueError(f"there is no folder {path} to load params from")
    if any(path.glob(f"{digests.PREFIX}*.json")):
        return path, False
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    metric, highest = best or ("", False)
    there = Checkpoints(folder, keep_best=metric, highest=highest, verify=verify, say=say)
    steps = there.best_first() if best else there.newest_first()
    wanted = [s for s in steps if step is None or s == step]
    found = next((s for s in wanted if there.is_good(s, items)), None)
    if found is None:
        what = "" if step is None else f" of step {step}"
        what += f" that was evaluated by {metric!r}" if best else ""
        others = sorted({*there.newest_first()} - {*wanted})
        others = f"; there are {', '.join(map(str, others))}" if others else ""
        raise ValueError(f"{folder} has no usable checkpoint{what} to load params from{others}")
    return folder / str(found), True


def _complete(*folders):
    """Waits for the digests of all processes, and lets no file be in none of them."""
    cluster.share()
    if cluster.several() and cluster.process() == 0:
        for folder in folders:
            with contextlib.suppress(Damaged, OSError):  # told by who reads it
                digests.complete(folder)


def _end_all(error):
    if isinstance(error, storage.SaveError):
        cluster.fail(f"error: {error}", 1)
    traceback.print_exception(error)
    cluster.fail(f"crashed while saving: {type(error).__name__}: {error}", CRASHED)


def _numbered(directory, ending=""):
    """Steps with a folder here, in order, whatever is in it."""
    if not directory.is_dir():
        return []
    names = [path.name.removesuffix(ending) for path in directory.glob(f"*{ending}")]
    return sorted(int(name) for name in names if name.isdecimal())

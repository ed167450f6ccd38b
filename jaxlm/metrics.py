"""What a run writes down, and where its time went: JSON lines, TensorBoard, W&B when asked.

  metrics.jsonl   one object per optimizer step     evals.jsonl     one per evaluation
  samples.jsonl   one per sample                    events.jsonl    wall time by kind, warnings

Files are append-only. A line is written whole or not at all, also when the disk is full. NaN and
infinities, which JSON lacks, are written as null. TensorBoard goes through tensorboardX: clu would
import TensorFlow.
"""

import contextlib
import errno
import hashlib
import importlib
import importlib.util
import json
import math
import os
import platform
import struct
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

STEPS, EVALS, SAMPLES, EVENTS = "metrics.jsonl", "evals.jsonl", "samples.jsonl", "events.jsonl"


class Writer:
    """Writes the records of a run into its work folder. `quiet` (not process 0): writes nothing.

    `wandb` names a project of Weights & Biases; empty = off. Raises `ValueError` if it is asked
    for and not installed, and `OSError` with a sentence for people if the disk is full.
    """

    def __init__(
        self,
        workdir: Path | str,
        tensorboard: bool = True,
        wandb: str = "",
        config: Mapping | None = None,
        quiet: bool = False,
    ):
        self.workdir, self.quiet = Path(workdir), quiet
        self._tensorboard, self._purge = None, None
        self._wants_tensorboard = tensorboard and not quiet
        self._wandb = _start_wandb(self.workdir, wandb, config) if wandb and not quiet else None
        if not quiet:
            self.workdir.mkdir(parents=True, exist_ok=True)

    def steps(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Optimizer steps, one object each. Call before the checkpoint that follows them."""
        records = list(records)
        self._write(STEPS, records)
        self._scalars(records)

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """One evaluation."""
        self._write(EVALS, [record])
        self._scalars([{_under("eval", k): v for k, v in record.items()}])

    def sample(self, record: Mapping[str, Any]) -> None:
        """One sample: step, fraction, source, prompt, text."""
        self._write(SAMPLES, [record])
        if board := self._board():
            text = f"**{record.get('prompt', '')}**{record.get('text', '')}"
            board.text(record.get("step", 0), f"sample/{record.get('source', '')}", text)

    def event(self, kind: str, seconds: float = 0.0, step: int = 0, **more: Any) -> None:
        """A kind of wall time, or something that happened."""
        record = {"kind": kind, "step": step, "seconds": seconds, "time": time.time(), **more}
        self._write(EVENTS, [record])

    def truncate(self, step: int, last: int | None = None) -> None:
        """On resume: drops steps, evaluations and samples beyond `step`, and half-written lines.

        Evaluations and samples of the step `last` go too, where they are made anew: that of the
        run, or one whose evaluation was cut short.
        Events stay, as the time they took was really spent.
        """
        if self.quiet:
            return
        self._purge = step + 1
        _keep(self.workdir / STEPS, lambda record: record.get("step", 0) <= step)
        looked = step if last is None else min(step, last - 1)
        for name in (EVALS, SAMPLES):
            _keep(self.workdir / name, lambda record: record.get("step", 0) <= looked)
        _keep(self.workdir / EVENTS, lambda record: True)

    def flush(self) -> None:
        """Waits until the disk has the records; a crash of this process alone loses none anyway."""
        for name in (STEPS, EVALS, SAMPLES, EVENTS):
            if not self.quiet and (self.workdir / name).exists():
                with open(self.workdir / name, "ab") as file:
                    os.fsync(file.fileno())

    def close(self) -> None:
        """Ends the run at W&B; the files are complete at any time."""
        if self._wandb:
            self._wandb.finish()
        self._wandb = None

    def _write(self, name, records):
        if not self.quiet:
            append(self.workdir / name, records)

    def _board(self):
        if self._wants_tensorboard and not self._tensorboard:
            self._tensorboard = Board(self.workdir / "tensorboard", self._purge)
        return self._tensorboard

    def _scalars(self, records):
        if board := self._board():
            board.scalars(records)
        if self._wandb:
            for record in records:
                self._wandb.log({k: v for k, v in record.items() if _is_number(v)})


class Board:
    """An event file of TensorBoard. `purge`: the step from which on earlier files are void.

    Written like the JSON lines: tensorboardX's own writer puts events into the queue of a thread,
    which dies of a full disk, and then the training waits for room in the queue for ever.
    """

    def __init__(self, folder: Path, purge: int | None = None):
        from tensorboardX.proto import event_pb2, summary_pb2
        from tensorboardX.record_writer import masked_crc32c

        proto = vars(event_pb2) | vars(summary_pb2)  # made when imported; type checkers see none
        self._event, self._summary = proto["Event"], proto["Summary"]
        self._crc = masked_crc32c
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.0f}.{platform.node()}.{os.getpid()}"
        self.path = folder / name
        self._write([{"file_version": "brain.Event:2"}])
        if purge is not None:
            start = proto["SessionLog"](status=proto["SessionLog"].START)
            self._write([{"step": purge, "session_log": start}])

    def scalars(self, records: Iterable[Mapping[str, Any]]) -> None:
        """The numbers of each record at its step, under their names."""
        value = self._summary.Value
        events = []
        for record in records:
            numbers = {k: float(v) for k, v in record.items() if k != "step" and _is_number(v)}
            values = [value(tag=name, simple_value=number) for name, number in numbers.items()]
            events.append({"step": int(record["step"]), "summary": self._summary(value=values)})
        self._write(events)

    def text(self, step: int, tag: str, text: str) -> None:
        """A text in Markdown."""
        from tensorboardX.summary import text as summary

        printable = text.encode("utf-8", "replace").decode()
        self._write([{"step": int(step), "summary": summary(tag, printable)}])

    def _write(self, events):
        """Each event as a record: length, its checksum, content, its checksum."""
        data = b""
        for event in events:
            content = self._event(wall_time=time.time(), **event).SerializeToString()
            length = struct.pack("<Q", len(content))
            data += length + struct.pack("<I", self._crc(length))
            data += content + struct.pack("<I", self._crc(content))
        _append(self.path, data)


class Clock:
    """Adds up wall time by kind: `with clock("data_wait"): ...`. Time inside an inner block counts
    for the inner kind only, so that the kinds add up to what really passed."""

    def __init__(self):
        self._seconds: dict[str, float] = {}
        self._inner = [0.0]  # seconds spent in blocks inside each open block

    @contextlib.contextmanager
    def __call__(self, kind: str):
        self._inner.append(0.0)
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            self.add(kind, seconds - self._inner.pop())
            self._inner[-1] += seconds

    def add(self, kind: str, seconds: float) -> None:
        """Adds seconds that were measured elsewhere."""
        self._seconds[kind] = self._seconds.get(kind, 0.0) + seconds

    def drain(self) -> dict[str, float]:
        """Seconds by kind since the last call."""
        seconds, self._seconds = self._seconds, {}
        return seconds


def append(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Appends records as JSON lines, all or none of them."""
    lines = (json.dumps(_plain(r), allow_nan=False) + "\n" for r in records)
    _append(path, "".join(lines).encode())


def _append(path, data):
    try:
        with open(path, "ab", buffering=0) as file:
            size = file.tell()
            try:
                rest = memoryview(data)
                while rest:
                    rest = rest[file.write(rest) :]
            except OSError:
                file.truncate(size)
                raise
    except OSError as error:
        raise _for_people(path, error) from error


def read(path: Path) -> list[dict]:
    """The records of a JSON-lines file, without lines that are no object (cut off by a crash)."""
    if not path.exists():
        return []
    return [record for _, record in _lines(path)]


def _lines(path):
    """(raw line, record) of each whole line."""
    with open(path, "rb") as file:
        for raw in file:
            with contextlib.suppress(ValueError):
                record = json.loads(raw)
                if raw.endswith(b"\n") and isinstance(record, dict):
                    yield raw, record


def _keep(path, wanted):
    """Rewrites the file with the lines whose record is wanted, atomically."""
    if not path.exists():
        return
    new = path.with_name(path.name + ".new")
    try:
        with open(new, "wb") as file:
            file.writelines(raw for raw, record in _lines(path) if wanted(record))
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except OSError as error:
        raise _for_people(path, error) from error


def _for_people(path, error):
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    remedy = "free some space" if full else "make it writable"
    text = (
        f"cannot write {path}: {error.strerror or error}; {remedy} and run the same command again"
    )
    return OSError(error.errno, text)


def _plain(value):
    """As JSON can hold it: arrays of one number become numbers, NaN and infinities null."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, (str, bool, int, type(None))):
        return value
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)


def _is_number(value):
    return isinstance(value, (int, float)) or getattr(value, "ndim", None) == 0


def _under(group, name):
    return name if name == "step" else f"{group}/{name}"


def _start_wandb(workdir, project, config):
    if importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f"logging to the W&B project {project!r} was asked for, but wandb is not installed: "
            'pip install "jaxlm[wandb]", or leave it away with --config.log.wandb=""'
        )
    wandb = importlib.import_module("wandb")

    where = str(workdir.resolve())
    run = wandb.init(
        project=project,
        dir=where,
        name=workdir.name,
        id=hashlib.sha256(where.encode()).hexdigest()[:16],  # the same run again after a restart
        resume="allow",
        config=dict(config or {}),
    )
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run

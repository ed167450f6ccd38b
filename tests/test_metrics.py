"""JSON lines that survive crashes, full disks and resumption; TensorBoard; the clock."""

import contextlib
import errno
import importlib.util
import json
import os
import resource
import signal
import struct

import numpy as np
import pytest

from jaxlm import metrics
from jaxlm.metrics import Board, Clock, Writer, append, read


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_records_are_written_exactly_and_nan_is_null(tmp_path):
    writer = Writer(tmp_path / "run", tensorboard=False)
    loss = np.float32(2.7182817)
    writer.steps([{"step": 1, "loss": loss, "norm/grads": float("inf"), "weights": np.arange(2)}])
    writer.evaluation({"step": np.int64(1), "bits_per_char/code": float("nan")})
    writer.sample({"step": 1, "source": "code", "prompt": "def", "text": " é\ud800\n"})
    writer.event("compile", 1.5, 1, cached=True)
    (step,) = records(tmp_path / "run" / "metrics.jsonl")
    assert step == {"step": 1, "loss": float(loss), "norm/grads": None, "weights": [0, 1]}
    assert np.float32(step["loss"]) == loss
    assert records(tmp_path / "run" / "evals.jsonl") == [{"step": 1, "bits_per_char/code": None}]
    assert records(tmp_path / "run" / "samples.jsonl")[0]["text"] == " é\ud800\n"
    (event,) = records(tmp_path / "run" / "events.jsonl")
    assert event.pop("time") > 1e9
    assert event == {"kind": "compile", "step": 1, "seconds": 1.5, "cached": True}


def test_truncate_drops_later_steps_and_a_half_written_line(tmp_path):
    writer = Writer(tmp_path, tensorboard=False)
    writer.steps({"step": s, "loss": 0.0} for s in range(1, 11))
    writer.evaluation({"step": 5})
    writer.evaluation({"step": 10})
    writer.event("train_step", 1.0, 10)
    for name in ("metrics.jsonl", "events.jsonl"):
        with open(tmp_path / name, "a") as file:
            file.write('{"step": 11, "lo')
    again = Writer(tmp_path, tensorboard=False)
    again.truncate(6)
    again.steps([{"step": 7, "loss": 1.0}])
    again.event("resume", step=6)
    assert [r["step"] for r in records(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6, 7]
    assert [r["step"] for r in records(tmp_path / "evals.jsonl")] == [5]
    assert [r["kind"] for r in records(tmp_path / "events.jsonl")] == ["train_step", "resume"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "evals.jsonl", "events.jsonl", "metrics.jsonl",
    ]  # fmt: skip


def test_truncate_that_fails_leaves_the_file(tmp_path, monkeypatch):
    writer = Writer(tmp_path, tensorboard=False)
    writer.steps([{"step": 1}, {"step": 2}])

    def no_space(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="free some space and run the same command again"):
        writer.truncate(1)
    assert [r["step"] for r in records(tmp_path / "metrics.jsonl")] == [1, 2]


@pytest.fixture
def small_files():
    """Sets a limit to the size of files: it cuts writes short as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


def test_full_disk_leaves_only_whole_lines(tmp_path, small_files):
    path = tmp_path / "metrics.jsonl"
    append(path, [{"step": 1, "loss": 2.0}])
    before = path.read_bytes()
    small_files(len(before) + 10)
    with pytest.raises(OSError, match=r"cannot write .*metrics\.jsonl: .*run the same command"):
        append(path, [{"step": 2, "loss": 2.0}])
    small_files(2**20)
    assert path.read_bytes() == before
    append(path, [{"step": 2, "loss": 1.0}])
    assert [r["step"] for r in records(path)] == [1, 2]


def test_full_disk_stops_tensorboard_with_a_sentence(tmp_path, small_files):
    board = Board(tmp_path / "tensorboard")
    before = board.path.read_bytes()
    small_files(1000)
    with pytest.raises(OSError, match=r"cannot write .*tfevents.*run the same command"):
        board.scalars({"step": step, "loss": 1.0} for step in range(1000))
    assert board.path.read_bytes() == before


def test_read_skips_what_a_crash_cut_off(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff\n[1]\n{"step": 2}\n{"step": 3}')
    assert read(path) == [{"step": 1}, {"step": 2}]
    assert read(tmp_path / "none.jsonl") == []


def test_quiet_writes_nothing(tmp_path):
    writer = Writer(tmp_path / "run", quiet=True, wandb="project")
    writer.steps([{"step": 1, "loss": 2.0}])
    writer.truncate(0)
    writer.event("start")
    writer.close()
    assert not (tmp_path / "run").exists()


def events(path):
    """What TensorBoard reads from an event file; checks the checksums."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    data = path.read_bytes()
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        content, rest = data[12 : 12 + length], data[12 + length :]
        assert struct.unpack("<I", data[8:12]) == (masked_crc32c(data[:8]),)
        assert struct.unpack("<I", rest[:4]) == (masked_crc32c(content),)
        data = rest[4:]
        yield Event.FromString(content)


def test_tensorboard_files_hold_the_scalars(tmp_path):
    writer = Writer(tmp_path)
    writer.truncate(4)
    writer.steps([{"step": 5, "loss": np.float32(2.5), "norm/grads": None, "note": "text"}])
    writer.evaluation({"step": 5, "bits_per_char/code": 1.5})
    writer.sample({"step": 5, "source": "code", "prompt": "def", "text": " f(x):\udc80"})
    writer.close()
    (file,) = (tmp_path / "tensorboard").glob("events.out.tfevents.*")
    version, purge, step, evaluation, sample = events(file)
    assert version.file_version == "brain.Event:2"
    assert (purge.step, purge.session_log.status) == (5, 1)  # START: later steps are void
    assert [(v.tag, v.simple_value) for v in step.summary.value] == [("loss", 2.5)]
    assert [v.tag for v in evaluation.summary.value] == ["eval/bits_per_char/code"]
    assert sample.summary.value[0].tag == "sample/code/text_summary"
    assert {e.step for e in (step, evaluation, sample)} == {5}


def test_wandb_that_is_missing_is_refused_with_the_remedy(tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        metrics.importlib.util, "find_spec", lambda name: None if name == "wandb" else real(name)
    )
    with pytest.raises(ValueError, match=r"pip install \"jaxlm\[wandb\]\""):
        Writer(tmp_path, tensorboard=False, wandb="project")


def test_clock_counts_each_second_once(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    clock = Clock()
    with clock("train_step"):
        now[0] += 2
        with clock("compile"):
            now[0] += 5
        now[0] += 1
    with contextlib.suppress(KeyError), clock("data_wait"):
        now[0] += 4
        raise KeyError
    clock.add("start", 0.5)
    assert clock.drain() == {"compile": 5.0, "train_step": 3.0, "data_wait": 4.0, "start": 0.5}
    assert clock.drain() == {}

"""What the loop waits for while it looks at a run, and what it does not wait for."""

import dataclasses
import io
import os
import signal
import threading
from contextlib import closing

import jax
import pytest
import test_columns
import tiny
import whole_runs

from jaxlm import observe, train
from jaxlm.checkpoint import Checkpoints, storage
from jaxlm.config import check
from jaxlm.data import chat
from jaxlm.hf import kept
from jaxlm.host.console import Console
from jaxlm.metrics import Clock, Writer
from jaxlm.specs import EvalSpec


def test_compressors_are_run_here_where_their_thread_gets_no_time(monkeypatch):
    monkeypatch.setattr(observe, "PATIENCE", 0.01)
    observer = object.__new__(observe.Observer)
    starved, done = threading.Event(), []
    observer._thread = threading.Thread(target=starved.wait)
    observer._compress = lambda: done.append(1)
    observer._thread.start()
    observer._wait_for_compressors()
    assert done
    starved.set()
    observer._thread.join()
    observer._wait_for_compressors()
    assert len(done) == 1, "it had come to its end by itself"


@pytest.mark.parametrize("named_by", ["config.json", "generation_config.json"])
def test_tasks_end_where_generation_does(tmp_path, monkeypatch, named_by):
    """Also at what a Hugging Face model, which the run began with, and the template name."""
    test_columns.write_pairs(tmp_path)
    built, prepared = test_columns.made(tmp_path, tmp_path / "run")
    run = dataclasses.replace(built.run, eval=EvalSpec(tasks="some"))
    run.workdir.mkdir()
    files: list[dict] = [{"eos_token_id": [65, 66]}, {}]
    files = files if named_by == "config.json" else files[::-1]
    kept.write(run.workdir, kept.Kept(run.model, *files))
    given = []
    monkeypatch.setattr(observe, "RunningTasks", lambda *args: given.append(args))
    monkeypatch.setattr(chat.Template, "stops", frozenset({67}))
    with jax.set_mesh(built.mesh), closing(Writer(run.workdir)) as writer:
        parts = prepared, Console(stream=io.StringIO()), writer, Clock()
        observer = observe.Observer(built._replace(run=run), *parts)
    ((_, _, ends, _),) = given
    assert ends == observer.generator.ends == {prepared.tokenizer.eos, 65, 66, 67}


@pytest.mark.slow
def test_a_signal_cuts_an_evaluation_short_and_the_next_start_makes_it(home, monkeypatch):
    monkeypatch.setenv("JAXLM_TEST_TEXT", str(home / "text"))
    c = tiny.get_config()
    c.update(workdir=str(home / "cut"), steps=6)
    c.model.layers = 1
    c.eval.update(every=2, samples="")
    c.checkpoint.update(every=2, keep=9, keep_best="loss/code")
    of = lambda file: [line["step"] for line in whole_runs.lines(home, "cut", file)]
    log = io.StringIO()
    go = lambda: train.train(check(c), Console(stream=log))
    tick = observe.Observer._tick

    def struck(self, done, total):
        if (home / "cut" / "evals.jsonl").exists():  # the second one
            os.kill(os.getpid(), signal.SIGTERM)
        tick(self, done, total)

    monkeypatch.setattr(observe.Observer, "_tick", struck)
    assert go() == train.EXIT["SIGTERM"]
    assert of("metrics.jsonl") == [1, 2, 3, 4]
    assert of("evals.jsonl") == [2], "nothing of the one that was cut short"
    monkeypatch.undo()
    monkeypatch.setenv("JAXLM_TEST_TEXT", str(home / "text"))
    assert go() == 0
    losses = {e["step"]: e["loss/code"] for e in whole_runs.lines(home, "cut", "evals.jsonl")}
    best = f"by loss/code: step {min(losses, key=losses.__getitem__)} ({min(losses.values()):.3f})"
    assert f"step 6: best so far {best}" in (out := log.getvalue()), out
    assert f"best {best}" in (home / "cut" / "report.html").read_text()
    assert of("metrics.jsonl") == [1, 2, 3, 4, 5, 6]
    assert of("evals.jsonl") == [2, 4, 6]
    checkpoints = home / "cut" / "checkpoints"
    assert "unseen" not in Checkpoints(checkpoints).about(6)
    for line in whole_runs.lines(home, "cut", "evals.jsonl"):
        known = storage.read(checkpoints / str(line["step"])).metrics
        assert known["loss/code"] == line["loss/code"], "also of what was evaluated after the save"

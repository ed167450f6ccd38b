"""What frozen models say of every record, computed once: the same losses, and never another's."""

import contextlib
import dataclasses
import errno
import fcntl
import functools
import importlib
import json
import random
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlm import columns, together
from jaxlm.build import build
from jaxlm.checkpoint import Checkpoints, storage
from jaxlm.checkpoint.digest import named
from jaxlm.config import check, defaults, source
from jaxlm.contract import Column, compose
from jaxlm.data import cache, rowfile, tokenizer
from jaxlm.data.batches import in_order
from jaxlm.data.prepare import prepare
from jaxlm.hf import kept
from jaxlm.methods.dpo import dpo
from jaxlm.methods.follow import follow
from jaxlm.models.transformer import DecoderConfig, decoder
from jaxlm.resume import restore_or_start, save
from jaxlm.start import require_same_tokens
from jaxlm.train import feed

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Two sources of pairs, and of pairs taken apart."""
    home = tmp_path_factory.mktemp("columns")
    write_pairs(home)
    return home


def write_pairs(home):
    rng = random.Random(0)
    home.mkdir(exist_ok=True)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 7))) for _ in range(60)]
    say = lambda n: " ".join(rng.choices(words, k=n))
    for name in ("one", "two"):
        rows = [{"prompt": say(3), "chosen": say(3), "rejected": say(2)} for _ in range(30)]
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (home / name).mkdir()
        for i in range(8):
            (home / name / f"{i}.txt").write_text(say(60))


def made(home, work, method="dpo", **keys):
    """(built, prepared) of a run on the sources."""
    c = defaults()
    c.update(name="columns", workdir=str(work), method=method, steps=4, batch=8)
    for name in ("one", "two"):
        text = source(source=str(home / name), glob="*.txt")
        c.data.mix[name] = (
            text if method == "distill" else source(source=str(home / f"{name}.jsonl"))
        )
    c.data.update(tokenizer="byte", length=64, held_out=0.3, template="plain")
    c.model.update(width=16, layers=1, heads=2)
    c.optimizer.learning_rate = 1e-2
    c.update_from_flattened_dict(keys)
    run = check(c)
    prepared = prepare(run.data, home / "cache")
    built = build(run, prepared.tokenizer.vocabulary_size)
    require_same_tokens(built, prepared.tokenizer)
    return built, prepared


class Training:
    """A run by hand, as `train` does it: its batches have their columns."""

    def __init__(self, home, work, **keys):
        self.built, self.prepared = made(home, work, **keys)
        self.checkpoints = Checkpoints(work / "checkpoints")
        self.said = []
        with jax.set_mesh(self.built.mesh):
            self.state, self.at = restore_or_start(self.built, self.prepared, self.checkpoints)
            first = None if self.at else self.state.params
            self.beside = columns.ready(
                self.built,
                self.prepared,
                self.checkpoints,
                first,
                cache=home / "cache",
                writers=together.writers(home / "cache"),
                say=self.said.append,
                progress=lambda *a: None,
            )

    def run(self, steps):
        losses = []
        with jax.set_mesh(self.built.mesh):
            step, _ = self.built.step()
            rows = feed(self.built.run, self.prepared, self.at, beside=self.beside)
            for _ in range(steps):
                batch = self.built.put(next(rows))
                self.state, metrics = step(self.state, batch, jax.random.key(0))
                losses.append(float(metrics["loss"]))
            save(self.built, self.prepared, self.checkpoints, self.state, {})
            self.checkpoints.wait()
        return losses


def of_each_pair(home):
    """What the column holds of some records, computed now."""
    run = Training(home, home / "run", **{"dpo.reference": "precomputed"})
    some = np.repeat([0, 1], 6), np.tile(np.arange(-3, 3), 2)
    return run.beside(dict(zip(("source", "index"), some, strict=True)))["reference"].tolist()


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_a_precomputed_reference_trains_as_a_live_one(home, tmp_path, method):
    live = Training(home, tmp_path / "live", method=method)
    kept = Training(
        home, tmp_path / "kept", method=method, **{f"{method}.reference": "precomputed"}
    )
    np.testing.assert_allclose(live.run(4), kept.run(4), atol=1e-6)
    bytes_of = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
    assert bytes_of(live.state) - bytes_of(kept.state) == bytes_of(live.state.params)
    assert not kept.state.extras


def test_the_reference_is_that_of_the_start(home, tmp_path):
    """Continued, the params are others: the column stays, also if it has to be made again."""
    keys = {"method": "dpo", "dpo.reference": "precomputed", "seed": 3}
    whole = Training(home, tmp_path / "whole", **keys).run(4)
    first = Training(home, tmp_path / "cut", **keys)
    losses = first.run(2)
    again = Training(home, tmp_path / "cut", **keys)
    assert again.at == 2
    assert not again.said, "found in the cache"
    record = {"source": np.array([0, 1]), "index": np.array([2, 1])}
    before = first.beside(record)["reference"]
    for folder in (home / "cache" / "columns").iterdir():
        for file in folder.glob("*.npy"):
            file.unlink()
    made_anew = Training(home, tmp_path / "cut", **keys)
    assert made_anew.said, "was computed"
    np.testing.assert_array_equal(made_anew.beside(record)["reference"], before)
    losses += made_anew.run(2)
    np.testing.assert_allclose(losses, whole, atol=1e-6)


def test_what_does_not_match_is_computed_anew(home, tmp_path):
    keys = {"method": "dpo", "dpo.reference": "precomputed"}
    told = lambda n, **more: bool(Training(home, tmp_path / str(n), **keys, **more).said)
    assert told(0, seed=5)
    assert not told(1, seed=5)
    assert told(2, seed=6), "other params"
    template = home / "other.jinja"
    template.write_text("{% for m in messages %}{{ m.content + eos_token }}{% endfor %}")
    assert told(3, seed=5, **{"data.template": str(template)}), "another template"
    assert told(4, seed=5, **{"data.length": 60}), "other records"
    assert told(5, seed=5, **{"model.rope_theta": 500.0}), "the same params mean another model"


def test_a_column_of_other_code_is_another(tmp_path, monkeypatch):
    file = tmp_path / "of_my_own.py"
    file.write_text("def fn(lm, params, batch): return {}")
    monkeypatch.syspath_prepend(tmp_path)
    fn = importlib.import_module("of_my_own").fn
    before = columns.code(functools.partial(fn))
    assert before == columns.code(fn)
    file.write_text(file.read_text() + "  # another")
    after = columns.code(fn)
    assert after != before
    read, model = Path.read_bytes, "models/layers.py"
    other = lambda path: read(path) + b"#" * str(path).endswith(model)
    monkeypatch.setattr(Path, "read_bytes", other)
    assert columns.code(fn) != after, "the model's code counts too"


def test_a_pass_reads_as_many_rows_as_a_step_does_at_one_time(home, tmp_path, monkeypatch):
    seen = []

    def spied(prepared, source, rows, *rest):
        seen.append(rows)
        return in_order(prepared, source, rows, *rest)

    monkeypatch.setattr(columns, "in_order", spied)
    keys = {"dpo.reference": "precomputed", "seed": 9, "batch": 16, "accumulate": 2}
    Training(home, tmp_path / "run", **keys)
    assert set(seen) == {8}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"one": ["weights"]}, r"'one' gives \['weights'\], which the batch has already"),
        ({"one": ["kept"], "two": ["kept"]}, r"\['kept'\] are given by more than one column"),
    ],
)
def test_a_column_overwrites_nothing(home, tmp_path, fields, said):
    built, _ = made(home, tmp_path / "run")

    def column(names):
        return Column(lambda lm, params, batch: dict.fromkeys(names, batch["weights"]), "")

    columns = {name: column(names) for name, names in fields.items()}
    method = dataclasses.replace(built.run.method, columns=columns)
    with pytest.raises(ValueError, match=said):
        built._replace(run=dataclasses.replace(built.run, method=method)).zeros(8)


def test_what_cannot_be_made_again_is_told(home, tmp_path):
    keys = {"method": "dpo", "dpo.reference": "precomputed", "seed": 7}
    Training(home, tmp_path / "run", **keys).run(1)
    facts = tmp_path / "run" / "checkpoints" / "once" / "facts.json"
    other = {"fingerprints": {"reference": "0" * 64}}
    facts.write_text(json.dumps(other))
    with pytest.raises(ValueError, match="cannot be made again"):
        Training(home, tmp_path / "run", **keys)
    facts.unlink()
    with pytest.raises(ValueError, match="does not say which model"):
        Training(home, tmp_path / "run", **keys)


def test_too_large_is_told_before(home, tmp_path, monkeypatch):
    keys = {"method": "dpo", "dpo.reference": "precomputed", "seed": 8}
    free = columns.shutil.disk_usage(home)._replace(free=100)
    monkeypatch.setattr(columns.shutil, "disk_usage", lambda path: free)
    with pytest.raises(ValueError, match=r"takes 4.8e-07 GB .* 1e-07 GB are free"):
        Training(home, tmp_path / "run", **keys)


def test_a_pass_that_is_cut_off_leaves_nothing_to_read(home, tmp_path, monkeypatch):
    """By a disk that fills, and as kill -9 leaves it: files of their full size, rows still zero."""
    keys = {"dpo.reference": "precomputed", "seed": 11, "data.length": 62}
    of = lambda at: Training(home, tmp_path / str(at), **keys)
    folder, calls = home / "cache" / "columns", []
    there = lambda: {path for path in folder.glob("*") if path.suffix != ".lock"}
    before = there()
    write = rowfile.os.pwrite

    def full(fd, data, at):
        calls.append(at)
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data, at)

    with monkeypatch.context() as patch:
        patch.setattr(rowfile.os, "pwrite", full)
        with pytest.raises(ValueError, match=r"the disk is full: .* the prepared reference"):
            of(0)
    assert there() == before
    with monkeypatch.context() as patch:
        patch.setattr("jaxlm.data.cache.shutil.rmtree", lambda *_, **__: None)  # -9: no cleaning up
        patch.setattr(rowfile.os, "pwrite", full)
        with pytest.raises(ValueError, match="the disk is full"):
            of(0)
    (torn,) = folder.glob(".*.building")
    assert list(torn.glob("*.npy"))
    whole = of(1)
    assert whole.said, "was computed"
    assert not torn.exists()
    some = {"source": np.array([0, 0, 1, 1]), "index": np.array([0, -1, 0, -1])}
    kept = whole.beside(some)["reference"]
    assert (kept < 0).all()
    assert not of(2).said
    np.testing.assert_array_equal(of(2).beside(some)["reference"], kept)


class Killed(BaseException):
    """No `Exception`: nothing is tidied, as behind a kill -9."""


@contextlib.contextmanager
def killed_behind(writes):
    """The write behind so many never comes."""
    calls, write = [], rowfile.os.pwrite

    def pwrite(fd, data, at):
        if len(calls) == writes:
            raise Killed
        calls.append(at)
        return write(fd, data, at)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns, "MARK_SECONDS", 0.0)
        patch.setattr(rowfile.os, "pwrite", pwrite)
        yield


def test_a_pass_that_was_killed_goes_on_to_the_same_bits(home, tmp_path, monkeypatch):
    of = lambda at: Training(home, tmp_path / at, **{"dpo.reference": "precomputed", "seed": 12})
    cache, computed = home / "cache" / "columns", []
    before = {path for path in cache.glob("*") if path.is_dir()}

    def counted(*args):
        for found in in_order(*args):
            computed.append(found[0])
            yield found

    monkeypatch.setattr(columns, "in_order", counted)
    of("whole")
    (folder,) = {path for path in cache.glob("*") if path.is_dir()} - before
    whole = {file.name: file.read_bytes() for file in folder.glob("*.npy")}
    batches = len(computed)
    shutil.rmtree(folder)
    computed.clear()
    for writes in random.Random(1).sample(range(1, batches // 2), 2):
        with killed_behind(writes), pytest.raises(Killed):  # a batch lies side by side: one write
            of("cut")
        assert not folder.exists()
    assert any("going on behind record" in text for text in of("cut").said)
    assert len(computed) == batches + 2, "only what was under way is computed again"
    assert {file.name: file.read_bytes() for file in folder.glob("*.npy")} == whole
    assert not list(cache.glob(".*building"))
    assert not (folder / columns.MARK).exists()


def test_a_pass_in_other_batches_begins_anew(home, tmp_path):
    """Another program's last bits may be others."""
    keys = {"dpo.reference": "precomputed", "seed": 13}
    with killed_behind(2), pytest.raises(Killed):
        Training(home, tmp_path / "run", **keys)
    said = Training(home, tmp_path / "run", **keys, batch=16).said
    assert said
    assert not any("going on" in text for text in said)


class Alone(columns._Pass):
    """A pass over three batches that keeps nothing of them."""

    def __init__(self, folder):
        self.folder, self.name, self.say, self.computed = folder, "reference", print, 0

    def _batches(self, params, begin=0):
        for i in range(3):
            self.computed += 1
            yield i, np.arange(1), {}

    def _write(self, at, batches, done):
        return {"computed": len(list(batches))}

    def progress(self, done, total, note):
        raise AssertionError(note)


@contextlib.contextmanager
def built_by_another_run(folder):
    with open(folder.parent / f".{folder.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def test_one_of_several_processes_never_waits_for_another_run(tmp_path, monkeypatch):
    """Its fellows wait for it in each batch, and may be who that run's process waits for."""
    work = Alone(tmp_path / "column")
    with built_by_another_run(work.folder):
        with pytest.raises(AssertionError, match="another process is preparing it, waiting"):
            work.run(None, writes=True)
        monkeypatch.setattr(columns.cluster, "several", lambda: True)
        work.run(None, writes=True)
        assert work.computed == 3
        assert cache.check(work.folder)[0] == {"computed": 3}
        work.run(None, writes=True)
    assert work.computed == 6, "there meanwhile, and its fellows still need it in each batch"


def test_who_has_the_lock_leaves_a_build_without_it_alone(tmp_path, monkeypatch):
    """The other run was killed, and a third one has its lock, while this one still builds."""

    class Several(Alone):
        def _write(self, at, batches, done):
            (at / "row").touch()
            locks.close()
            with monkeypatch.context() as patch:
                patch.setattr(columns.cluster, "several", lambda: False)
                Alone(self.folder).run(None, writes=True)
            assert (at / "row").exists()
            return super()._write(at, batches, done)

    work = Several(tmp_path / "column")
    monkeypatch.setattr(columns.cluster, "several", lambda: True)
    with contextlib.ExitStack() as locks:
        locks.enter_context(built_by_another_run(work.folder))
        work.run(None, writes=True)
    assert not list(tmp_path.glob(".*building"))
    assert cache.check(work.folder)[0] == {"computed": 3}


def test_what_another_run_has_made_meanwhile_is_not_computed_again(tmp_path):
    work = Alone(tmp_path / "column")
    work.run(None, writes=True)
    work.run(None, writes=True)
    assert work.computed == 3


def teacher_in(folder, seed=0, train_tokenizer=False, **options):
    """A folder as `jaxlm.convert` makes them, of a model wider than the student."""
    model = DecoderConfig(vocabulary=320, width=24, layers=2, heads=2, **options)
    params = decoder(model, "cpu").init(jax.random.key(seed))
    folder.mkdir(exist_ok=True)
    kept.write(folder, kept.Kept(model, {"max_position_embeddings": 64}, {}))
    if train_tokenizer:
        tokenizer.train_bpe(["hello there"] * 9, 300, folder / "tokenizer")
    else:
        tokenizer.save_byte(folder / "tokenizer")
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    storage.save_in_parts(folder / "checkpoints" / "0", "params", [named(params)], {})
    return {"method": "distill", "distill.teacher": str(folder)}


def test_a_teacher_of_another_shape_live_and_kept(home, tmp_path):
    keys = teacher_in(tmp_path / "teacher")
    live = Training(home, tmp_path / "live", **keys)
    assert not live.said
    losses = live.run(2)
    again = Training(home, tmp_path / "live", **keys)
    assert again.at == 2
    kept_all = Training(home, tmp_path / "kept", **keys, **{"distill.top_k": 320})
    assert not kept_all.state.extras
    np.testing.assert_allclose(kept_all.run(2), losses, rtol=5e-3)  # float16 on disk
    some = Training(home, tmp_path / "some", **keys, **{"distill.top_k": 8}).run(2)
    assert all(0 < a < b for a, b in zip(some, losses, strict=True))
    teacher_in(tmp_path / "teacher", seed=1)
    with pytest.raises(ValueError, match="is not the model that this run started with"):
        Training(home, tmp_path / "live", **keys)


def test_teachers_that_cannot_be(home, tmp_path):
    there = tmp_path / "teacher"
    with pytest.raises(ValueError, match="there is no folder"):
        made(home, tmp_path / "run", method="distill", **{"distill.teacher": str(there)})
    keys = teacher_in(there, train_tokenizer=True)
    with pytest.raises(ValueError, match=r"another tokenizer .* there 266 tokens .* here 258 "):
        made(home, tmp_path / "run", **keys)
    keys = teacher_in(there, learned_positions=32)
    with pytest.raises(ValueError, match=r"a table of 32 positions, .* config.data.length=64"):
        made(home, tmp_path / "run", **keys)
    routed = {"distill.expert": str(there), "distill.expert_sources": "onne"}
    with pytest.raises(ValueError, match="names 'onne', which is no source; did you mean 'one'"):
        made(home, tmp_path / "run", **keys, **routed)


def test_what_is_precomputed_cannot_follow():
    with pytest.raises(ValueError, match="computed once, before training: it would never move"):
        compose(dpo(reference="precomputed"), follow())
    with pytest.raises(ValueError, match="the same rewards would be logged twice"):
        dpo(reference="precomputed", initial=True)
    with pytest.raises(ValueError, match="may be 'live' or 'precomputed'"):
        dpo(reference="cached")

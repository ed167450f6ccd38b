"""Checkpoints come back bit for bit, or are refused for the right reason."""

import errno
import json
import os
import pathlib
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.checkpoint import Checkpoints, SaveError
from jaxlm.checkpoint import digest as digests
from jaxlm.host import cluster
from jaxlm.params import load as load_params
from jaxlm.sharding import MeshSpec, make_mesh

FIXTURE = pathlib.Path(__file__).parent / "fixtures" / "checkpoint_v1"


def toy(seed=0, width=8, dtype=jnp.float32):
    """Params, an optimizer state with empty nodes, and odd leaves, as the loop would save them."""
    key = jax.random.key(seed)
    params = {
        "embed": {"table": jax.random.normal(key, (16, width), dtype)},
        "blocks": {"0": {"kernel": jax.random.normal(key, (width, 3)).astype(jnp.bfloat16)}},
    }
    frozen = optax.masked(optax.sgd(0.1), {"embed": True, "blocks": False})
    opt_state = optax.chain(optax.clip(1.0), optax.adamw(1e-3), frozen).init(params)
    odd = {"step": jnp.int32(7), "flags": jnp.array([True, False]), "none": None, "empty": {}}
    return {"params": params, "opt_state": opt_state, "odd": odd, "extras": {}}


def abstract(items):
    return jax.eval_shape(lambda: items)


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture
def said():
    return []


@pytest.fixture
def checkpoints(tmp_path, said):
    """Two checkpoints, of steps 10 and 20, with seeds 10 and 20."""
    with Checkpoints(tmp_path / "checkpoints", say=said.append) as made:
        for step in (10, 20):
            made.save(step, toy(step), {"schema": 1, "position": step * 8})
        made.wait()
        yield made


# What is saved comes back.


def test_round_trip_is_bit_exact_and_keeps_structure(checkpoints):
    assert checkpoints.steps() == [10, 20]
    assert checkpoints.latest() == 20
    assert checkpoints.about(20) == {"schema": 1, "position": 160}
    assert_same(checkpoints.restore(20, abstract(toy())), toy(20))


def test_loads_some_items_or_part_of_one(checkpoints):
    wanted = abstract(toy())
    assert_same(
        checkpoints.restore(10, {"params": wanted["params"]}), {"params": toy(10)["params"]}
    )
    embed = {"params": {"embed": wanted["params"]["embed"]}}
    got = checkpoints.restore(10, embed, part=True)
    assert_same(got, {"params": {"embed": toy(10)["params"]["embed"]}})
    with pytest.raises(ValueError, match=r"blocks/0/kernel: was \[8, 3\] bfloat16, now absent"):
        checkpoints.restore(10, embed)


@pytest.mark.parametrize(("data", "fsdp", "tensor"), [(1, 8, 1), (2, 2, 2), (1, 1, 4), (1, 4, 2)])
def test_restores_onto_another_mesh(tmp_path, data, fsdp, tensor):
    table = jnp.arange(256.0).reshape(16, 16)
    saved_on = make_mesh(MeshSpec(fsdp=4, tensor=2))
    split = NamedSharding(saved_on, PartitionSpec("tensor", "fsdp"))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"params": {"table": jax.device_put(table, split)}}, {})
        mesh = make_mesh(MeshSpec(data, fsdp, 1, tensor), jax.devices()[: data * fsdp * tensor])
        other = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
        wanted = jax.ShapeDtypeStruct(table.shape, table.dtype, sharding=other)
        got = checkpoints.restore(1, {"params": {"table": wanted}})["params"]["table"]
    assert got.sharding.is_equivalent_to(other, 2)
    np.testing.assert_array_equal(got, table)


@pytest.mark.parametrize("everywhere", [False, True])
def test_every_restored_buffer_can_be_donated(tmp_path, everywhere):
    params = {f"{n}": jnp.arange(float(n)) for n in (1, 3, 100, 1000, 4096, 50_000)}
    mesh = make_mesh(MeshSpec())
    place = NamedSharding(mesh, PartitionSpec()) if everywhere else None
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), params)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"params": params}, {})
        got = checkpoints.restore(1, {"params": wanted})["params"]

    def addresses(tree):
        return [s.data.unsafe_buffer_pointer() for x in tree.values() for s in x.addressable_shards]

    before = addresses(got)
    after = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)(got)
    assert addresses(after) == before
    np.testing.assert_array_equal(after["50000"], params["50000"] + 1)


def test_arrays_may_be_donated_as_soon_as_save_returns(tmp_path):
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        for step in range(1, 6):
            x = jnp.full((500, 500), float(step))
            checkpoints.save(step, {"params": {"x": x}}, {})
            overwrite(x).block_until_ready()
        wanted = {"params": {"x": jax.ShapeDtypeStruct((500, 500), jnp.float32)}}
        for step in range(1, 6):
            assert (checkpoints.restore(step, wanted)["params"]["x"] == step).all()


def test_typed_keys_come_back(tmp_path):
    items = {"noise": {"key": jax.random.key(3)}}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, items, {})
        got = checkpoints.restore(1, abstract(items))["noise"]["key"]
    assert got.dtype == items["noise"]["key"].dtype
    np.testing.assert_array_equal(jax.random.key_data(got), jax.random.key_data(jax.random.key(3)))


# Which ones are kept.


def test_keeps_the_newest_and_the_best(tmp_path):
    losses = {10: 3.0, 20: 1.0, 30: float("nan"), 40: 2.0, 50: 2.5}
    with Checkpoints(tmp_path, keep=2, keep_best="loss") as checkpoints:
        for step, loss in losses.items():
            checkpoints.save(step, {"params": {"x": jnp.ones(3)}}, {}, {"loss": np.float32(loss)})
        assert checkpoints.steps() == [20, 40, 50]
    with Checkpoints(tmp_path, keep=1, keep_best="loss") as again:  # knows the losses from disk
        again.save(60, {"params": {"x": jnp.ones(3)}}, {}, {"loss": 4.0})
        assert again.steps() == [20, 60]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["20", "60"]


def test_the_best_may_be_the_highest(tmp_path):
    accuracies = {10: 0.5, 20: 0.9, 30: float("nan"), 40: 0.7, 50: 0.6}
    with Checkpoints(tmp_path, keep=1, keep_best="accuracy", highest=True) as checkpoints:
        for step, accuracy in accuracies.items():
            checkpoints.save(step, {"params": {"x": jnp.ones(3)}}, {}, {"accuracy": accuracy})
        assert checkpoints.steps() == [20, 50]


def test_what_is_measured_after_a_save_may_make_it_the_best(tmp_path):
    with Checkpoints(tmp_path, keep=1, keep_best="loss") as checkpoints:
        for step, metrics in ((10, {"loss": 2.0}), (20, {}), (30, {"other": 5.0})):
            checkpoints.save(step, {"params": {"x": jnp.ones(3)}}, {"step": step}, metrics)
        assert checkpoints.steps() == [10, 30]
        checkpoints.add_metrics(30, {"loss": 3.0})
        assert checkpoints.steps() == [10, 30]
        checkpoints.add_metrics(30, {"loss": 1.0})
        assert checkpoints.steps() == [30]
    assert digests.verify(tmp_path / "30").metrics == {"loss": 1.0, "other": 5.0}
    assert digests.read(tmp_path / "30").about == {"step": 30}


def test_a_damaged_one_does_not_count_as_kept(checkpoints):
    flip(data_file(checkpoints.directory / "20"))
    with Checkpoints(checkpoints.directory, keep=2, say=lambda text: None) as again:
        again.save(30, toy(30), {})
        assert again.steps() == [10, 30]


def test_saving_a_step_again_moves_what_stood_there_aside(checkpoints, said):
    with Checkpoints(checkpoints.directory, say=said.append) as again:
        again.restore(10, abstract(toy()))
        again.save(10, toy(11), {})  # just restored: nothing to do
        again.save(15, toy(15), {})
        assert again.steps() == [10, 15]
    assert (checkpoints.directory / "20.aside").is_dir()
    assert any("Checkpoint 20 was moved aside" in line for line in said)


# Damage.


def data_file(folder):
    """The largest file of the params."""
    return max((p for p in (folder / "params").rglob("*") if p.is_file()), key=os.path.getsize)


def flip(path, count=64):
    content = bytearray(path.read_bytes())
    for place in np.random.default_rng(0).choice(len(content), count, replace=False):
        content[place] ^= 0xFF
    path.write_bytes(content)


def truncate(folder):
    path = data_file(folder)
    path.write_bytes(path.read_bytes()[:-1])


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def tamper(folder):
    path = folder / "digest-0-of-1.json"
    path.write_text(path.read_text().replace("float32", "float64"))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: flip(data_file(folder)), "the bytes of params/.* have changed"),
        (truncate, "bytes instead of"),
        (lambda folder: data_file(folder).unlink(), "params/.* is missing"),
        (lambda folder: shutil.rmtree(folder / "params"), "params/.* is missing"),
        (lambda folder: (folder / "_CHECKPOINT_METADATA").unlink(), "_METADATA is missing"),
        (empty, "the folder is empty"),
        (lambda folder: (folder / "digest-0-of-1.json").unlink(), "not written to its end"),
        (lambda folder: (folder / "digest-0-of-1.json").write_text("{"), "is not readable"),
        (lambda folder: (folder / "digest-0-of-1.json").write_text("[]"), "is not readable"),
        (tamper, "digest-0-of-1.json has changed"),
    ],
)
def test_a_damaged_checkpoint_is_skipped_by_name(checkpoints, said, damage, reason):
    damage(checkpoints.directory / "20")
    assert checkpoints.steps() == [10]
    assert checkpoints.latest() == 10
    assert re.match(f"Checkpoint 20 is skipped: .*{reason}", said[0])
    with pytest.raises(digests.Damaged, match=reason):
        checkpoints.restore(20, abstract(toy()))
    assert_same(checkpoints.restore(10, abstract(toy())), toy(10))


def test_of_what_is_opened_only_what_is_read_is_hashed(checkpoints, monkeypatch):
    """Not older steps, nor other items: which may be many times as much."""
    hashed, whole = [], digests._hash
    monkeypatch.setattr(digests, "_hash", lambda path: hashed.append(path) or whole(path))
    wanted = abstract(toy())["params"]
    assert_same(load_params(checkpoints.directory, wanted), toy(20)["params"])
    found = {path.relative_to(checkpoints.directory).parts[:2] for path in hashed}
    assert {step for step, _ in found} == {"20"}
    assert {part for _, part in found} & toy().keys() == {"params"}
    flip(next(p for p in (checkpoints.directory / "20" / "opt_state").rglob("d/*")))
    assert_same(load_params(checkpoints.directory, wanted), toy(20)["params"])
    with pytest.raises(digests.Damaged, match=r"the bytes of opt_state/.* have changed"):
        Checkpoints(checkpoints.directory).restore(20, abstract(toy()))
    flip(data_file(checkpoints.directory / "20"))
    assert_same(load_params(checkpoints.directory, wanted), toy(10)["params"])
    with pytest.raises(ValueError, match=r"no usable checkpoint of step 20 .* there are 10$"):
        load_params(checkpoints.directory, wanted, step=20)


def test_sizes_alone_are_compared_when_asked(checkpoints):
    quick = Checkpoints(checkpoints.directory, verify="sizes", say=lambda text: None)
    flip(data_file(checkpoints.directory / "20"))
    assert quick.steps() == [10, 20]
    truncate(checkpoints.directory / "20")
    assert quick.steps() == [10]


def test_a_folder_under_another_step_is_skipped(checkpoints, said):
    (checkpoints.directory / "20").rename(checkpoints.directory / "25")
    assert checkpoints.steps() == [10]
    assert "25 is skipped: it holds step 20" in said[0]


def test_what_is_no_checkpoint_is_ignored(checkpoints, said):
    (checkpoints.directory / "notes.txt").write_text("mine")
    (checkpoints.directory / "30.orbax-checkpoint-tmp").mkdir()
    assert checkpoints.steps() == [10, 20]
    assert not said


def test_a_process_whose_digest_is_missing(checkpoints, said):
    folder = checkpoints.directory / "20"
    record = digests.read(folder)
    (folder / "digest-0-of-1.json").unlink()
    digests.write(folder, record, process=0, processes=2)
    assert checkpoints.steps() == [10]
    assert "the digest of process 1 of 2 is missing" in said[0]
    digests.write(folder, record, process=1, processes=2)
    assert checkpoints.steps() == [10, 20]
    assert_same(checkpoints.restore(20, abstract(toy())), toy(20))


@pytest.fixture
def old_list(monkeypatch):
    """Process 1 does not see the last file yet when it writes its digest, so nobody hashes it."""
    real, files = digests.write, digests._data_files

    def write(folder, record, *, process=0, processes=2):
        real(folder, record, process=0, processes=2)
        with monkeypatch.context() as patch:
            patch.setattr(digests, "_data_files", lambda folder: files(folder)[:1])
            real(folder, record, process=1, processes=2)

    monkeypatch.setattr(digests, "write", write)
    monkeypatch.setattr(cluster, "several", lambda: True)


def test_no_file_is_in_nobodys_digest(checkpoints, old_list):
    """Also where the processes do not see the same files, on a network file system."""
    checkpoints.save(30, toy(), {})
    checkpoints.wait()
    checkpoints.save_once("reference", toy()["params"])
    for folder in (checkpoints.directory / "30", checkpoints.directory / "once" / "reference"):
        for name in digests._data_files(folder):
            content = (folder / name).read_bytes()
            (folder / name).write_bytes(content + b"x")
            with pytest.raises(digests.Damaged, match=re.escape(name)):
                digests.verify(folder)
            (folder / name).write_bytes(content)
        digests.verify(folder)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_share_the_work_of_looking_for_damage(checkpoints, processes):
    folder = checkpoints.directory / "20"
    files = digests._data_files(folder)
    assert len(files) > processes
    for name in files:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content + b"x")
        found = []
        for process in range(processes):
            try:
                digests.verify(folder, process=process, processes=processes)
            except digests.Damaged as error:
                found.append(str(error))
        assert len(found) == 1
        assert name in found[0]
        (folder / name).write_bytes(content)


# Another model is not damage.


def test_a_changed_model_is_named(checkpoints):
    wanted = abstract(toy(width=9))
    with pytest.raises(ValueError, match="another model or optimizer") as caught:
        checkpoints.restore(20, wanted)
    text = str(caught.value)
    assert "params/embed/table: was [16, 8] float32, now [16, 9] float32" in text
    assert "another workdir, or the config" in text
    assert "damaged" not in text
    assert not isinstance(caught.value, digests.Damaged)


def test_a_changed_model_is_named_even_where_files_are_damaged(checkpoints):
    flip(data_file(checkpoints.directory / "20"))
    with pytest.raises(ValueError, match="was saved from another model"):
        checkpoints.restore(20, abstract(toy(width=9)))


def test_dtypes_are_never_cast(checkpoints):
    with pytest.raises(ValueError, match=r"embed/table: was \[16, 8\] float32, now .* bfloat16"):
        checkpoints.restore(20, abstract(toy(dtype=jnp.bfloat16)))


def test_an_absent_item_is_named(checkpoints):
    wanted = {"ema": abstract(toy()["params"])}
    with pytest.raises(ValueError, match="holds no 'ema', only params, opt_state, odd"):
        checkpoints.restore(20, wanted)


def test_a_later_schema_says_upgrade(checkpoints, monkeypatch):
    monkeypatch.setattr(digests, "SCHEMA", 0)
    with pytest.raises(ValueError, match=r"newer jaxlm .checkpoint schema 1, .*upgrade"):
        checkpoints.steps()


# What is saved once.


def test_saved_once_comes_back_or_is_an_error(checkpoints):
    reference = toy(5)["params"]
    checkpoints.save_once("reference", reference)
    checkpoints.save(30, toy(30), {})
    assert_same(checkpoints.restore_once("reference", abstract(reference)), reference)
    assert checkpoints.steps() == [20, 30]
    folder = checkpoints.directory / "once" / "reference"
    flip(next(path for path in (folder / "reference" / "d").iterdir()), count=8)
    with pytest.raises(ValueError, match=r"have changed.*cannot be rebuilt.*another workdir"):
        checkpoints.restore_once("reference", abstract(reference))
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match="reference cannot be used: the folder is missing"):
        checkpoints.restore_once("reference", abstract(reference))
    checkpoints.save_once("reference", reference)
    with pytest.raises(ValueError, match="was saved from another model"):
        checkpoints.restore_once("reference", abstract(toy(width=9)["params"]))


# The params of another run.


@pytest.mark.parametrize("where", ["", "checkpoints", "checkpoints/20"])
def test_params_of_another_run(checkpoints, where):
    wanted = abstract(toy()["params"])
    assert_same(load_params(checkpoints.directory.parent / where, wanted), toy(20)["params"])


def test_params_of_another_run_that_cannot_be(checkpoints, tmp_path):
    wanted = abstract(toy()["params"])
    assert_same(load_params(tmp_path, wanted, step=10), toy(10)["params"])
    with pytest.raises(ValueError, match=r"has no usable checkpoint of step 7 .* are 10, 20"):
        load_params(tmp_path, wanted, step=7)
    with pytest.raises(ValueError, match=r"there is no folder .*nowhere"):
        load_params(tmp_path / "nowhere", wanted)
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match="bare has no usable checkpoint to load params"):
        load_params(tmp_path / "bare", wanted)
    with pytest.raises(ValueError, match=r"table: was \[16, 8\] float32, now \[16, 9\]"):
        load_params(tmp_path, abstract(toy(width=9)["params"]))


# Saves that fail, or are cut short.


def test_a_full_disk_is_one_sentence_and_harms_nothing(checkpoints, capfd):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    big = toy(30) | {"big": jax.random.normal(jax.random.key(0), (500, 500))}
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        checkpoints.save(30, big, {})
        with pytest.raises(SaveError, match=r"checkpoint 30 .*the disk is full.*untouched; free"):
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert capfd.readouterr() == ("", "")
    assert sorted(path.name for path in checkpoints.directory.iterdir()) == ["10", "20"]
    assert checkpoints.steps() == [10, 20]
    checkpoints.save(30, big, {})
    assert checkpoints.steps() == [20, 30]


def test_a_disk_that_fills_up_at_the_digest(checkpoints, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(digests, "write_atomically", full)
    checkpoints.save(30, toy(30), {})
    with pytest.raises(SaveError, match="the disk is full"):
        checkpoints.save(40, toy(40), {})
    monkeypatch.undo()
    assert checkpoints.steps() == [10, 20]


def test_a_failed_save_does_not_hide_another_error(checkpoints, said, monkeypatch):
    monkeypatch.setattr(digests, "write", lambda *args, **kwargs: 1 / 0)
    checkpoints.save(30, toy(30), {})
    with pytest.raises(KeyError, match="first"), checkpoints:
        raise KeyError("first")
    assert any("the last checkpoint was not saved: division by zero" in line for line in said)


def test_only_what_a_person_can_mend_is_told_as_such(checkpoints, monkeypatch):
    monkeypatch.setattr(digests, "write", lambda *args, **kwargs: 1 / 0)
    checkpoints.save(30, toy(30), {})
    with pytest.raises(ZeroDivisionError):
        checkpoints.wait()
    assert checkpoints.steps() == [10, 20]


def test_the_first_checkpoint_on_a_full_disk_has_none_before_it(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(digests, "write_atomically", full)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, toy(1), {})
    with pytest.raises(SaveError, match=r"the first one; free some space.*start again"):
        checkpoints.wait()
    assert not [*checkpoints.directory.iterdir()]


def test_the_digest_is_written_behind_the_loop(checkpoints, monkeypatch):
    release, write = threading.Event(), digests.write

    def slow(*args, **kwargs):
        release.wait(20)
        write(*args, **kwargs)

    monkeypatch.setattr(digests, "write", slow)
    checkpoints.save(30, toy(30), {})  # returns although its digest cannot be written yet
    assert 30 not in [s for s, problem in checkpoints.inspect().items() if not problem]
    release.set()
    assert checkpoints.steps() == [20, 30]


_KILLED = """
import os, signal, sys, jax.numpy as jnp
from jaxlm.checkpoint import digest, storage
from jaxlm.checkpoint import Checkpoints
die = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
checkpoints = Checkpoints(sys.argv[1])
checkpoints.save(1, {"params": jnp.ones((300, 300))}, {})
checkpoints.wait()
if sys.argv[2] == "digest":
    digest.write_atomically = die
checkpoints.save(2, {"params": jnp.ones((300, 300))}, {})
if sys.argv[2] == "arrays":
    die()
checkpoints.wait()
"""


@pytest.mark.parametrize("during", ["arrays", "digest"])
def test_kill_during_a_save_leaves_the_one_before(tmp_path, during, said):
    command = [sys.executable, "-c", _KILLED, str(tmp_path), during]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": os.getcwd()}, timeout=120)
    assert done.returncode == -signal.SIGKILL
    with Checkpoints(tmp_path, say=said.append) as checkpoints:
        assert checkpoints.latest() == 1
        assert all("not written to its end" in line for line in said)
        checkpoints.save(2, {"params": jnp.zeros((300, 300))}, {})
        assert checkpoints.steps() == [1, 2]
    assert not list(tmp_path.glob("*tmp*"))


# Layouts of the past.


def test_a_checkpoint_of_schema_1_still_loads():
    checkpoints = Checkpoints(FIXTURE)
    assert checkpoints.steps() == [7]
    assert json.loads((FIXTURE / "7" / "digest-0-of-1.json").read_text())["schema"] == 1
    assert checkpoints.about(7) == {"position": 56, "config": {"steps": 100}}
    assert_same(checkpoints.restore(7, abstract(_fixture_items())), _fixture_items())


def _fixture_items():
    """Made without random numbers, which may differ between versions of JAX."""
    params = {"table": jnp.arange(12.0).reshape(4, 3), "scale": jnp.ones(3, jnp.bfloat16)}
    return {"params": params, "opt_state": optax.adamw(1e-3).init(params), "step": jnp.int32(7)}


if __name__ == "__main__":  # made the fixture: python -m tests.test_checkpoint /checkpoint_v1
    with Checkpoints(sys.argv[1]) as made:
        made.save(7, _fixture_items(), {"position": 56, "config": {"steps": 100}})

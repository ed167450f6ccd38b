"""A whole run saved on one mesh goes on on others, with layers stacked or apart as each has them by
default: the same bits, lying as the new mesh says, and the loss of the same next rows, in buffers
that are used again."""

import jax
import numpy as np
import pytest
import test_columns

from jaxlm import resume, train
from jaxlm.build import build
from jaxlm.checkpoint import Checkpoints, stacks
from jaxlm.checkpoint.digest import named
from jaxlm.config import check, defaults, source
from jaxlm.data.prepare import prepare

pytestmark = pytest.mark.slow
AT = 2  # the step that is saved
KEY = jax.random.key(0)
HOME = {"fsdp": 8}
OTHERS = [
    {"fsdp": 4, "tensor": 2},
    {"data": 2, "fsdp": 2, "sequence": 2},
    {"fsdp": 1, "tensor": 8},
    {"fsdp": 1},  # one device
    {"fsdp": 4, "tensor": 2, "scan": "on"},
]


def made(home, mesh):
    """A run of DPO by Muon: with moments of two kinds, a reference that is saved once, and an
    average that moves. `mesh`: its axes, and whether layers are stacked ("scan")."""
    mesh = dict(mesh)
    c = defaults()
    c.update(name="reshard", workdir=str(home / "run"), method="dpo + ema", steps=9)
    c.data.mix.pairs = source(source=str(home / "one.jsonl"))
    c.data.update(tokenizer="byte", length=64, held_out=0.3, template="plain")
    c.model.update(width=16, layers=2, heads=8, vocabulary=264)
    c.model.scan_layers = mesh.pop("scan", "off")
    c.optimizer.update(name="muon", learning_rate=1e-2)
    c.batch = 8
    c.mesh.update(**mesh)
    run = check(c)
    prepared = prepare(run.data, home / "cache")
    return build(run, 0, jax.devices()[: int(np.prod([*mesh.values()]))]), prepared


class Loop:
    """A run as `train` goes through it, from where its checkpoints say."""

    def __init__(self, built, prepared, checkpoints):
        self.built, self.prepared = built, prepared
        self.state, self.at = resume.restore_or_start(built, prepared, checkpoints)
        self.step, self.between = built.step()

    def go_on(self):
        """Another step, and what follows it: its loss, and the rows that it read."""
        batch = next(train.feed(self.built.run, self.prepared, self.at, self.built.rows_here()))
        self.state, metrics = self.step(self.state, self.built.put(batch), KEY)
        self.at += 1
        self.state = self.between(self.at, self.state)
        return float(metrics["loss"]), batch["index"].tolist()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Where a run lies that was saved on `HOME`, its state, the next loss, and the next rows."""
    home = tmp_path_factory.mktemp("reshard")
    test_columns.write_pairs(home)
    built, prepared = made(home, HOME)
    with jax.set_mesh(built.mesh), Checkpoints(built.run.workdir / "checkpoints") as checkpoints:
        loop = Loop(built, prepared, checkpoints)
        for _ in range(AT):
            loop.go_on()
        resume.save(built, prepared, checkpoints, loop.state, {})
        return home, jax.device_get(loop.state), *loop.go_on()


def title(mesh):
    return " ".join(f"{axis}={size}" for axis, size in mesh.items())


@pytest.mark.parametrize("mesh", OTHERS, ids=title)
def test_a_whole_run_goes_on_on_another_mesh(saved, mesh):
    home, expected, loss, rows = saved
    built, prepared = made(home, mesh)
    with jax.set_mesh(built.mesh), Checkpoints(built.run.workdir / "checkpoints") as checkpoints:
        loop = Loop(built, prepared, checkpoints)
        state = loop.state
        assert checkpoints.about(loop.at)["position"] == AT * built.run.rows
        jax.tree.map(lies, state, built.abstract)
        same(by_layer(state), by_layer(expected))  # held no longer: it would hinder donation
        before = places(state)
        now, read = loop.go_on()
    assert read == rows
    assert now == pytest.approx(loss, rel=1e-5)
    assert all(x.is_deleted() for x in jax.tree.leaves(state))
    assert places(loop.state) == before


def same(found, expected):
    assert found.keys() == expected.keys()
    for path, x in expected.items():
        np.testing.assert_array_equal(found[path], x)


def by_layer(state):
    """Path -> the array of one layer, wherever it lies."""
    found = named(jax.device_get(state))
    cut = lambda x, layer: x if layer is None else x[layer]
    return {path: cut(found[name], layer) for path, (name, layer) in stacks.places(found).items()}


def lies(x, wanted):
    assert x.sharding.is_equivalent_to(wanted.sharding, x.ndim)


def places(state):
    """Where in memory the arrays of a state lie."""
    shards = (s for x in jax.tree.leaves(state) for s in x.addressable_shards)
    return {shard.data.unsafe_buffer_pointer() for shard in shards}

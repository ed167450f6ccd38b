"""What was saved with layers apart comes back stacked, and the other way round, bit for bit."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from jaxlm import optim, sharding
from jaxlm.checkpoint import Checkpoints, stacks
from jaxlm.checkpoint.digest import named

STACKED, APART = toy.toy(scan=True, layers=3), toy.toy(layers=3)


def numbered(tree):
    """The same tree, each of its numbers another."""
    count = itertools.count(1)
    fill = lambda x: jnp.reshape(jnp.arange(x.size) + 10_000 * next(count), x.shape).astype(x.dtype)
    return jax.tree.map(fill, tree)


def through_disk(folder, items, abstract):
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, items, {})
        return checkpoints.restore(1, abstract)


def same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.slow
def test_params_averages_and_references_change_their_form(tmp_path):
    params = numbered(APART.init(jax.random.key(0)))
    there = {"params": params, "extras": {"ema": numbered(params), "steps": jnp.int32(7)}}
    here = {
        "params": toy.stack(params),
        "extras": there["extras"] | {"ema": toy.stack(there["extras"]["ema"])},
    }
    same(through_disk(tmp_path / "up", there, jax.eval_shape(lambda: here)), here)
    same(through_disk(tmp_path / "down", here, jax.eval_shape(lambda: there)), there)
    with Checkpoints(tmp_path / "up") as checkpoints:
        checkpoints.save_once("reference", params)
        of = jax.eval_shape(lambda: here["params"])
        same(checkpoints.restore_once("reference", of), here["params"])


# Moments stacked as params are; those of two optimizers in one; one per layer, once with two parts.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor", "sm3"])
def test_the_state_of_an_optimizer_changes_its_form(tmp_path, name):
    states = []
    for lm in (APART, STACKED):
        tx, _ = optim.build(optim.OptimizerSpec(name=name), 9, lm.axes)
        params = jax.eval_shape(lm.init, jax.random.key(0))
        states.append(jax.eval_shape(tx.init, params))
    apart = numbered(states[0])
    found = through_disk(tmp_path / "up", {"opt_state": apart}, {"opt_state": states[1]})
    up = found["opt_state"]
    again = through_disk(tmp_path / "down", {"opt_state": up}, {"opt_state": states[0]})
    same(again["opt_state"], apart)
    moments = {n: x for n, x in named(apart).items() if "/blocks/1/mlp/up/kernel" in n}
    assert moments
    for path, x in moments.items():
        stack = path.replace("/blocks/1/", "/blocks/")
        if stack in named(up):
            np.testing.assert_array_equal(named(up)[stack][1], x)
        else:  # of optimizers that see one parameter per layer
            kernel, _, axis = stack.partition("/kernel")
            np.testing.assert_array_equal(named(up)[f"{kernel}/kernel/1{axis}"], x)


def test_what_else_differs_is_told_by_layer(tmp_path):
    there = {"params": APART.init(jax.random.key(0))}
    wider = {"params": jax.eval_shape(toy.toy(scan=True, layers=3, F=48).init, jax.random.key(0))}
    told = r"9 arrays differ:\n.*params/blocks/0/mlp/down/kernel: was \[32, 16\] float32, now \[48"
    with pytest.raises(ValueError, match=told):
        through_disk(tmp_path, there, wider)


def test_stacks_lie_as_the_mesh_says_and_on_the_hosts_where_they_are_to(tmp_path):
    mesh = sharding.make_mesh(sharding.MeshSpec(fsdp=4, tensor=2))
    params = numbered(APART.init(jax.random.key(0)))
    shapes = jax.eval_shape(STACKED.init, jax.random.key(0))
    layout = sharding.param_shardings(STACKED.axes, shapes, mesh)
    names = jax.tree.leaves(STACKED.axes, is_leaf=lambda x: isinstance(x, tuple))
    layout = sharding.in_host_memory(names, layout)
    place = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
    wanted = {"params": jax.tree.map(place, shapes, layout)}
    found = through_disk(tmp_path, {"params": params}, wanted)["params"]
    jax.tree.map(lambda x, where: check_lies(x, where), found, layout)
    same(jax.device_get(found), jax.device_get(toy.stack(params)))


def check_lies(x, where):
    assert x.sharding.is_equivalent_to(where, x.ndim)
    assert x.sharding.memory_kind == where.memory_kind


def test_paths_are_those_of_one_layer():
    leaf = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    found = stacks.places(
        {
            "embed/table": leaf(9, 4),
            "0/mu/blocks/mlp/up/kernel": leaf(2, 4, 6),
            "1/blocks/1/mlp/up/kernel": leaf(4, 6),
            "2/blocks/mlp/up/kernel/0/1": leaf(6),
            "3/blocks/count": leaf(),
        }
    )
    assert found == {
        "embed/table": ("embed/table", None),
        "0/mu/blocks/0/mlp/up/kernel": ("0/mu/blocks/mlp/up/kernel", 0),
        "0/mu/blocks/1/mlp/up/kernel": ("0/mu/blocks/mlp/up/kernel", 1),
        "1/blocks/1/mlp/up/kernel": ("1/blocks/1/mlp/up/kernel", None),
        "2/blocks/0/mlp/up/kernel/1": ("2/blocks/mlp/up/kernel/0/1", None),
        "3/blocks/count": ("3/blocks/count", None),
    }

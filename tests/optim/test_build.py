"""Optimizers: equal to a hand computation, the same stacked and unstacked, refused in words."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy import stack, toy

from jaxlm import optim
from jaxlm.optim.build import is_matrix
from jaxlm.optim.named import ELEMENTWISE, names
from jaxlm.optim.rules import is_names
from jaxlm.sharding import MeshSpec, make_mesh, param_shardings


def spec(**knobs):
    return optim.OptimizerSpec(**{"schedule": "constant", "learning_rate": 0.1} | knobs)


def gradients(params, seed):
    keys = jax.random.split(jax.random.key(seed), len(jax.tree.leaves(params)))
    keys = jax.tree.unflatten(jax.tree.structure(params), list(keys))
    # Layers of very different scales: statistics over a stack of them would show.
    scale = lambda path: (
        10.0 ** -sum(len(str(getattr(k, "key", ""))) == 1 and k.key == "1" for k in path)
    )
    return jax.tree_util.tree_map_with_path(
        lambda path, p, key: scale(path) * jax.random.normal(key, p.shape), params, keys
    )


def after(tx, params, grads):
    """Params after one update per gradient, with what the step hands over beside it."""
    state = tx.init(params)
    update = jax.jit(lambda g, s, p: tx.update(g, s, p, taps={}, extras={}))
    for grad in grads:
        updates, state = update(grad, state, params)
        params = optax.apply_updates(params, updates)
    return params


def close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def test_a_field_that_is_set_reaches_any_optimizer_and_an_open_one_leaves_its_own():
    lm = toy()
    params = lm.init(jax.random.key(0))
    zero = jax.tree.map(jnp.zeros_like, params)

    def kept(**knobs):
        moved = after(optim.build(spec(name="lion", **knobs), 9, lm.axes)[0], params, [zero])
        return jnp.mean(moved["head"]["kernel"] / params["head"]["kernel"])

    np.testing.assert_allclose([kept(), kept(weight_decay=0.1)], [0.9999, 0.99], rtol=1e-5)


def test_muon_takes_kernels_of_blocks_only():
    matrices = [("embed", "heads"), ("layers", "ffn", "embed")]
    matrices += [("experts", "embed", "ffn"), ("layers", "experts", "embed", "ffn")]
    matrices += [
        ("experts_over_fsdp", None, "ffn"),
        ("layers", "experts_over_tensor", "embed", None),
    ]
    others = [("norm",), ("layers", "norm"), ("embed", "vocabulary"), ("positions", "embed")]
    assert [is_matrix(names) for names in matrices + others] == [True] * 6 + [False] * 4


def test_adamw_is_optax_adamw_with_its_mask():
    lm = toy()
    params = lm.init(jax.random.key(0))
    grads = [gradients(params, i) for i in range(3)]
    tx, _ = optim.build(spec(clip=0.0, weight_decay=0.3), 10, lm.axes)
    mask = jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key != "bias" and path[-1].key != "scale", params
    )
    theirs = optax.adamw(0.1, b1=0.9, b2=0.95, weight_decay=0.3, mask=mask)
    close(
        after(tx, params, grads),
        after(optax.with_extra_args_support(theirs), params, grads),
        rtol=1e-5,
        atol=1e-6,
    )


def test_clipping_is_by_global_norm():
    lm = toy()
    params = lm.init(jax.random.key(0))
    grads = gradients(params, 0)
    knobs = {"name": "sgd", "learning_rate": 1.0}
    moved = lambda clip: optax.tree.norm(
        optax.tree.sub(
            after(optim.build(spec(clip=clip, **knobs), 9, lm.axes)[0], params, [grads]), params
        )
    )
    np.testing.assert_allclose([moved(0.0), moved(0.5)], [optax.tree.norm(grads), 0.5], rtol=1e-4)


def test_rules_reach_the_update():
    lm = toy()
    params = lm.init(jax.random.key(0))
    zero = jax.tree.map(jnp.zeros_like, params)
    text = "table: weight_decay=0.5; head: learning_rate=0; output: learning_rate=0.1"
    tx, _ = optim.build(spec(weight_decay=0.2, rules=text), 9, lm.axes)
    ratio = jax.tree.map(lambda a, b: jnp.mean(a / b), after(tx, params, [zero]), params)
    block = ratio["blocks"]["1"]
    got = [ratio["embed"]["table"], ratio["head"]["kernel"], block["attention"]["output"]["kernel"]]
    got += [block["mlp"]["up"]["kernel"], block["mlp"]["up"]["bias"]]
    np.testing.assert_allclose(got, [0.95, 1, 0.998, 0.98, 1], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor", "lamb", "lion", "sm3"])
def test_stacked_layers_move_as_unstacked(name):
    flat, stacked = toy(), toy(scan=True)
    params = flat.init(jax.random.key(0))
    grads = [gradients(params, i) for i in range(3)]
    knobs = spec(name=name, learning_rate=0.01)
    a = after(optim.build(knobs, 9, flat.axes)[0], params, grads)
    b = after(optim.build(knobs, 9, stacked.axes)[0], stack(params), [stack(g) for g in grads])
    close(stack(a), b, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
def test_muon_takes_the_matrices_of_blocks_and_no_others(scan):
    lm = toy(scan=scan)
    params = lm.init(jax.random.key(0))
    tx, _ = optim.build(
        spec(name="muon", weight_decay=0.0, learning_rate=1.0, clip=0.0), 9, lm.axes
    )
    moved = optax.tree.sub(after(tx, params, [gradients(params, 3)]), params)
    taken = 0
    for names_, update in zip(
        jax.tree.leaves(lm.axes, is_leaf=is_names), jax.tree.leaves(moved), strict=True
    ):
        if is_matrix(names_):
            values = np.linalg.svd(np.asarray(update), compute_uv=False)
            values /= 0.2 * max(update.shape[-2:]) ** 0.5
            assert values.min() > 0.3
            assert values.max() < 1.4
            taken += values.size // values.shape[-1]
        else:  # the first step of Adam is the sign of the gradient
            np.testing.assert_allclose(np.abs(update), 1.0, rtol=1e-2)
    assert taken == 4 * 2


def test_muon_gives_adam_its_own_rate():
    lm = toy()
    params = lm.init(jax.random.key(0))
    tx, _ = optim.build(spec(name="muon", weight_decay=0.0, adam_learning_rate=0.3), 9, lm.axes)
    moved = optax.tree.sub(after(tx, params, [gradients(params, 3)]), params)
    np.testing.assert_allclose(np.abs(moved["head"]["kernel"]), 0.3, rtol=1e-3)


@pytest.mark.slow
def test_bfloat16_params_keep_float32_moments():
    lm = toy()
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), lm.init(jax.random.key(0)))
    for name in ("adamw", "muon"):
        tx, _ = optim.build(spec(name=name), 9, lm.axes)
        _, state = tx.update(params, tx.init(params), params)
        before, later = jax.tree.leaves(tx.init(params)), jax.tree.leaves(state)
        assert [x.dtype for x in before] == [x.dtype for x in later]
        assert {x.dtype for x in later} == {jnp.dtype("float32"), jnp.dtype("int32")}


def test_moment_dtype():
    lm = toy()
    tx, _ = optim.build(spec(moment_dtype="bfloat16"), 9, lm.axes)
    state = tx.init(lm.init(jax.random.key(0)))
    assert jax.tree.leaves(optax.tree.get(state, "mu"))[0].dtype == jnp.bfloat16
    assert jax.tree.leaves(optax.tree.get(state, "nu"))[0].dtype == jnp.float32


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor", "lamb"])
def test_state_lies_as_its_parameter(name, scan):
    lm = toy(scan=scan)
    shapes = jax.eval_shape(lm.init, jax.random.key(0))
    tx, _ = optim.build(spec(name=name), 9, lm.axes)
    mesh = make_mesh(MeshSpec(fsdp=4, tensor=2))
    shardings = optim.state_shardings(tx, shapes, lm.axes, mesh)
    state = jax.eval_shape(tx.init, shapes)
    assert jax.tree.structure(shardings) == jax.tree.structure(state)
    on_device = lambda shape, sharding: np.prod(sharding.shard_shape(shape.shape))
    bytes_of = lambda tree, lies: sum(jax.tree.leaves(jax.tree.map(on_device, tree, lies)))
    a_copy = bytes_of(shapes, param_shardings(lm.axes, shapes, mesh))
    copies = {"adamw": 2, "lamb": 2, "muon": 2, "adafactor": 1}[name]
    assert bytes_of(state, shardings) < 1.05 * copies * a_copy + 64
    tiny = jax.jit(tx.init, out_shardings=shardings)(
        jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    )
    assert jax.tree.structure(tiny) == jax.tree.structure(state)


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"name": "adamvv"}, "did you mean 'adam"),
        ({"name": "moun"}, "did you mean 'muon'"),
        ({"name": "lion", "eps": 1e-3}, "lion has no such argument"),
        ({"name": "adafactor", "rules": "embed: weight_decay=0.2"}, "only set weight_decay to 0"),
        ({"name": "sgd", "rules": "embed: weight_decay=0"}, "can not set weight_decay"),
        ({"name": "momo"}, "optimizer momo of optax cannot be used here"),
        ({"name": "lion", "eps": 1e-8}, "lion has no such argument"),
        ({"b1": 1.0}, "optimizer.b1 is 1.0"),
        ({"weight_decay": -0.5}, "may not be negative"),
        ({"clip": -1.0}, "may not be negative"),
        ({"eps": 0.0}, "optimizer.eps is 0.0; give one above 0"),
        ({"moment_dtype": "float8"}, "moment_dtype"),
        ({"second_moment_dtype": "float8"}, "second_moment_dtype"),
        ({"gradient_dtype": "int8"}, "gradient_dtype"),
        ({"name": "adafactor", "offload": True}, "which adafactor cannot"),
        ({"adam_learning_rate": 0.1}, "only read by muon.*adam_learning_rate=0"),
        ({"name": "sgdd", "adam_learning_rate": 0.1}, "did you mean 'sgd'"),
    ],
)
def test_refused(knobs, said):
    with pytest.raises(ValueError, match=said):
        optim.build(spec(**knobs), 9, toy().axes)


def test_every_elementwise_name_exists():
    assert set(names()) >= ELEMENTWISE
    assert {"adamw", "muon", "sgd"} <= set(names())

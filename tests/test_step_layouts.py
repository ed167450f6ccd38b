"""The whole step of a decoder on eight fake devices, with its layouts as types."""

import jax
import numpy as np
import pytest

from jaxlm import sharding
from jaxlm.checkpoint import Checkpoints
from jaxlm.contract import compose
from jaxlm.methods.learnability import learnability
from jaxlm.methods.next_token import next_token
from jaxlm.models.transformer import DecoderConfig, decoder
from jaxlm.optim import OptimizerSpec
from jaxlm.optim import build as build_optimizer
from jaxlm.optim.state import state_axes, state_shardings
from jaxlm.step import init_state, make_score, make_step

TENSOR = sharding.MeshSpec(fsdp=4, tensor=2)
SEQUENCE = sharding.MeshSpec(data=2, fsdp=2, sequence=2)
ROWS, LENGTH, VOCABULARY = 8, 16, 64


def batch():
    """Two documents in each row, and two tokens of padding."""
    words = np.random.default_rng(0).integers(0, VOCABULARY, (ROWS, LENGTH + 1)).astype(np.int32)
    place = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (ROWS, LENGTH))
    segments = np.where(place < 6, 1, np.where(place < 14, 2, 0)).astype(np.int32)
    positions = np.where(place < 6, place, place - 6).astype(np.int32)
    weights = (segments > 0).astype(np.float32)
    tokens, targets = words[:, :-1], words[:, 1:]
    return {
        "tokens": tokens,
        "targets": targets,
        "weights": weights,
        "segments": segments,
        "positions": positions,
        "source": np.zeros(ROWS, np.int32),
        "index": np.arange(ROWS, dtype=np.int32),
    }


def model(sequence=1, **options):
    sizes = {"vocabulary": VOCABULARY, "width": 32, "layers": 2, "heads": 4, "kv_heads": 2}
    attention = "xla" if sequence == 1 else "auto"
    config = DecoderConfig(**sizes, scan_layers="on", attention=attention, **options)
    return decoder(config, "cpu", sequence=sequence)


def make(mesh_spec, *, explicit=False, optimizer="adamw", offload=False, selector=None, **options):
    """Mesh, first state and step."""
    mesh = sharding.make_mesh(mesh_spec, explicit=explicit)
    lm = model(mesh_spec.sequence, **options)
    tx, _ = build_optimizer(OptimizerSpec(name=optimizer, offload=offload), 100, lm.axes)
    method = compose(next_token(), selector) if selector else next_token()
    other = lambda path: lm.init(jax.random.key(7))
    start = lambda key: init_state(lm.init(key), method, tx, other)
    shapes = jax.eval_shape(start, jax.random.key(0))
    params = sharding.param_shardings(lm.axes, shapes.params, mesh)
    layout = jax.tree.map(lambda _: sharding.replicated(mesh), shapes)._replace(
        params=params,
        extras=dict.fromkeys(shapes.extras, params),
        opt_state=state_shardings(tx, shapes.params, lm.axes, mesh),
    )
    if offload:
        axes = state_axes(tx, shapes.params, lm.axes)
        there = sharding.in_host_memory(axes, layout.opt_state)
        layout = layout._replace(opt_state=there)
    key = jax.random.key(0)
    with jax.set_mesh(mesh):
        state = jax.device_put(jax.jit(start)(key), layout)
    return mesh, state, make_step(lm, method, tx, shardings=layout)


def take(mesh, state, step, steps=2):
    """The state after these steps, and the last metrics."""
    key = jax.random.key(1)
    with jax.set_mesh(mesh):
        rows = jax.device_put(batch(), sharding.batch_sharding(mesh))
        for _ in range(steps):
            state, metrics = step(state, rows, key)
    return state, metrics


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "options"),
    [
        (SEQUENCE, {}),
        (
            TENSOR,
            {
                "optimizer": "muon",
                "selector": learnability(filter_ratio=0.5, reference="other"),
            },
        ),
    ],
    ids=["sequence", "tensor, muon, learnability"],
)
def test_explicit_axes_give_the_same_step(spec, options):
    expected, metrics = take(*make(spec, **options))
    actual, typed = take(*make(spec, explicit=True, **options))
    np.testing.assert_allclose(typed["loss"], metrics["loss"], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
        np.testing.assert_allclose(a, b, atol=1e-4 * max(1, np.abs(b).max()))


@pytest.mark.slow
def test_whole_experts_go_on_where_slices_stopped(tmp_path):
    """Params saved in one layout are restored to the other, with the loss that they had."""
    experts = {"experts": 8, "ffn_width": 48, "router_balance": 0.1}
    mesh, state, step = make(TENSOR, experts_over="fsdp", **experts)
    kernel = state.params["blocks"]["mlp"]["experts"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 2, 32, 24)  # layers, experts, in, out
    lm = model(**experts)
    slices = jax.device_put(state.params, sharding.param_shardings(lm.axes, state.params, mesh))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"params": slices}, {})
        place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        found = checkpoints.restore(1, {"params": jax.tree.map(place, state.params)})
    score = make_score(lm, next_token())
    total, weight = score(jax.device_get(slices), {}, batch())["loss"]
    _, metrics = take(mesh, state._replace(**found), step, steps=1)
    np.testing.assert_allclose(metrics["loss"], total / weight, rtol=1e-5)


@pytest.mark.slow
def test_moments_on_the_hosts_are_restored_donated_and_the_same(tmp_path):
    mesh, state, step = make(TENSOR, offload=True)
    items = {"params": state.params, "opt_state": state.opt_state, "guard": state.guard}
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, items, {})
        restored = state._replace(**checkpoints.restore(1, jax.tree.map(place, items)))
    before = _addresses(restored)
    after, _ = take(mesh, restored, step, steps=1)
    assert _addresses(after) == before
    vectors = {"scale", "bias"}
    for path, x in jax.tree_util.tree_leaves_with_path(after.opt_state):
        matrix = x.ndim > 0 and path[-1].key not in vectors
        assert x.sharding.memory_kind == (sharding.HOST if matrix else "device")
    expected, _ = take(*make(TENSOR), steps=1)
    for a, b in zip(*(jax.tree.leaves(s.opt_state) for s in (after, expected)), strict=True):
        np.testing.assert_array_equal(a, b)
    # A CPU rounds rate · update + param once where no loop lies between.
    for a, b in zip(*(jax.tree.leaves(s.params) for s in (after, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=3e-7, atol=1e-8)


def _addresses(state):
    shards = (shard for x in jax.tree.leaves(state) for shard in x.addressable_shards)
    return {shard.data.unsafe_buffer_pointer() for shard in shards}

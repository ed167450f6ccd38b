"""The mixture of experts: its sorting, its products, its balance; against loops and by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_decoder import build, document, loss_of, pack, shaken, toy, two_rows

from jaxlm.flops import count_flops
from jaxlm.models import expert_blocks, experts
from jaxlm.models.transformer import decoder, unstack_layers

MIXTURE = {"experts": 5, "ffn_width": 48, "router_balance": 0.1}


def close(actual, expected, tolerance=1e-5):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def choices():
    """Experts of pairs: at random, all the same, none of the first, fewer pairs than experts."""
    rng = np.random.default_rng(0)
    yield rng.integers(0, 5, 37), 5
    yield np.full(20, 2), 5
    yield np.full(20, 4), 5
    yield rng.integers(3, 6, 64), 6
    yield np.array([6, 1, 6]), 8


@pytest.mark.parametrize("size", [1, 4, 7])
@pytest.mark.parametrize(("expert_P", "count"), list(choices()))
def test_every_pair_gets_a_slot_in_a_block_of_its_expert(expert_P, count, size):
    found = expert_blocks.slots(jnp.asarray(expert_P), count, size)
    slot_P, expert_B, used = map(np.asarray, found)
    assert len(set(slot_P)) == len(expert_P)
    assert slot_P.min() >= 0
    np.testing.assert_array_equal(expert_B[slot_P // size], expert_P)
    for expert in set(expert_P):
        assert np.all(np.diff(slot_P[expert_P == expert]) == 1), "they lie together, in order"
    assert set(slot_P // size) == set(range(used)), "no block before the last one is empty"
    assert used <= len(expert_B)


def test_blocks_cost_little_and_are_not_too_small():
    assert expert_blocks.block_size(2**16, 8) == 2**11
    assert expert_blocks.block_size(64, 8) == 8
    assert expert_blocks.block_size(2, 8) == 1
    size = expert_blocks.block_size(2**16, 8)
    slots = len(expert_blocks.slots(jnp.zeros(2**16, jnp.int32), 8, size)[1]) * size
    assert slots < 1.25 * 2**16


@pytest.mark.slow
def test_grouped_products_equal_a_loop_and_so_do_gradients():
    keys = jax.random.split(jax.random.key(0), 3)
    x, kernel = jax.random.normal(keys[0], (12, 4)), jax.random.normal(keys[1], (3, 4, 6))
    up, expert_B = jax.random.normal(keys[2], (12, 6)), jnp.array([0, 2, 2, 1])

    def loop(x, kernel):
        return jnp.concatenate([x[3 * b : 3 * b + 3] @ kernel[e] for b, e in enumerate(expert_B)])

    grouped = functools.partial(experts.grouped_product, expert_B=expert_B)
    for function in (lambda f: f(x, kernel), lambda f: jax.vjp(f, x, kernel)[1](up)):
        jax.tree.map(close, function(grouped), function(loop))


def routed(pairs, weights, tokens):
    return experts.Routed(jnp.asarray(pairs), jnp.asarray(weights), jnp.float32(tokens))


def test_balance_by_hand():
    even = routed([6.0, 6.0, 6.0, 6.0], [3.0, 3.0, 3.0, 3.0], 12)  # 2 of 4 experts each
    close(experts.load_balance(even), 2.0)
    collapsed = routed([12.0, 0.0, 0.0, 0.0], [12.0, 0.0, 0.0, 0.0], 12)  # 1 of 4
    close(experts.load_balance(collapsed), 4.0)
    skewed = routed([8.0, 4.0, 6.0, 6.0], [5.0, 1.0, 3.0, 3.0], 12)
    close(experts.load_balance(skewed), 4 * (40 + 4 + 18 + 18) / 144)
    assert experts.load_balance(skewed) > experts.load_balance(even)
    assert experts.load_balance(routed([0.0], [0.0], 0)) == 0


@pytest.mark.slow
def test_a_router_without_preference_costs_least():
    lm, params, _ = build(toy(scan_layers="on", **MIXTURE))

    def penalty(scale):
        blocks = params["blocks"]
        router = {"kernel": scale * blocks["mlp"]["router"]["kernel"]}
        scaled = {**params, "blocks": {**blocks, "mlp": {**blocks["mlp"], "router": router}}}
        return lm.hidden(scaled, two_rows())[2]["load_balance"]

    value_and_slope = jax.jit(jax.value_and_grad(penalty))
    close(value_and_slope(0.0)[0], 0.1 * 2)
    value, slope = value_and_slope(9.0)
    assert value > 0.1 * 2.1
    assert slope != 0


@pytest.mark.slow
def test_packing_and_padding_change_nothing():
    lm, params, logits = build(toy(**MIXTURE))
    params = shaken(params)
    packed = pack([document(4), document(5, 1)])
    alone = pack([document(4)], [document(5, 1)])
    both = logits(params, alone)
    close(logits(params, packed)[0, :9], np.concatenate([both[0, :4], both[1, :5]]))
    penalty = lambda batch: lm.hidden(params, batch)[2]["load_balance"]
    close(penalty(packed), penalty(alone))
    padding = {**packed, "tokens": packed["tokens"].at[0, 9:].set(7)}
    assert penalty(padding) == penalty(packed)


@pytest.mark.slow
def test_scanned_equals_unrolled(optimized):
    def gradient(scan):
        lm, params, _ = build(toy(scan_layers=scan, **MIXTURE))
        grad = jax.jit(jax.value_and_grad(loss_of(lm), has_aux=True))
        (value, taps), grads = grad(shaken(params), two_rows())
        return value, unstack_layers(taps), unstack_layers(grads)

    jax.tree.map(close, gradient("on"), gradient("off"))


@pytest.mark.slow
def test_tokens_meet_only_the_experts_they_chose():
    """Products are counted: far from every token through every expert."""

    def flops(**options):
        lm = decoder(toy(attention="xla", ffn_width=64, **options), "cpu")
        params = jax.eval_shape(lm.init, jax.random.key(0))
        ids = jax.ShapeDtypeStruct((8, 512), jnp.int32)
        batch = dict.fromkeys(("tokens", "segments", "positions"), ids)
        return count_flops(jax.make_jaxpr(lambda p, b: lm.hidden(p, b)[0])(params, batch))

    one = 2 * 2 * 4096 * 3 * 32 * 64  # of two layers
    router = 2 * 2 * 4096 * 32 * 8
    mixture = flops(experts=8, experts_per_token=2) - (flops() - one) - router
    assert 2 * one <= mixture <= 2.5 * one


@pytest.mark.slow
def test_initial_kernels_have_the_spread_of_dense_ones():
    _, params, _ = build(toy(width=128, experts=4, ffn_width=384))
    kernels = params["blocks"]["0"]["mlp"]["experts"]
    np.testing.assert_allclose(np.std(kernels["up"]["kernel"]), 128**-0.5, rtol=0.03)
    np.testing.assert_allclose(np.std(kernels["down"]["kernel"]), (384 * 4) ** -0.5, rtol=0.03)


@pytest.mark.slow
def test_no_dtype_is_promoted_silently():
    with jax.numpy_dtype_promotion("strict"):
        lm = decoder(toy(dtype="bfloat16", **MIXTURE), "cpu")
        params = jax.eval_shape(lm.init, jax.random.key(0))
        jax.eval_shape(jax.grad(loss_of(lm), has_aux=True), params, two_rows())

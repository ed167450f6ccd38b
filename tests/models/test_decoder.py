"""The decoder against an independent one, and what must hold for every attention backend."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_llama import llama
from toy_decoder import build, document, loss_of, pack, shaken, toy, two_rows

from jaxlm.models import layers
from jaxlm.models.transformer import decoder

FAMILIES = {
    "llama": {},
    "multi-head": {"kv_heads": 0, "tied": False},
    "multi-query": {"kv_heads": 1, "rope_theta": 500.0, "norm_eps": 1e-3},
    "llama 3.1": {"rope_theta": 50.0, "rope_scaling": "llama3 factor=8 length=16 low=1 high=2"},
    "linear": {"rope_scaling": "linear factor=2.5", "mlp_bias": True},
    "yarn": {"rope_theta": 9.0, "rope_scaling": "yarn factor=4 length=8 fast=2 slow=0.5"},
    "dynamic": {"rope_scaling": "dynamic factor=2 length=5", "attention_bias": True},
    "qwen 2": {"qkv_bias": True},
    "qwen 3": {"qk_norm": True, "head_width": 12},
    "gemma 2": {
        "activation": "geglu",
        "attention_soft_cap": 2.0,
        "logit_soft_cap": 3.0,
        "window": 3,
        "attention_scale": 0.25,
        "embedding_scale": 32**0.5,
        "norm": "rms_plus_one",
        "norm_place": "both",
        "layer_pattern": "local global",
    },
    "gemma 3": {
        "layers": 3,
        "window": 3,
        "layer_pattern": "local local global",
        "qk_norm": True,
        "norm": "rms_plus_one",
        "rope_theta": 500.0,
        "rope_scaling": "linear factor=3",
        "local_rope_theta": 20.0,
    },
    "olmo 2": {"qk_norm": True, "qk_norm_over": "width", "norm_place": "after", "tied": False},
    "gpt-neox": {
        "activation": "gelu_exact",
        "norm": "layer",
        "bias": True,
        "parallel_residual": True,
        "rotary_fraction": 0.5,
        "tied": False,
    },
    "mixtral": {"experts": 5, "experts_per_token": 2, "ffn_width": 48, "tied": False},
    "gpt-2": {"activation": "gelu", "norm": "layer", "bias": True, "learned_positions": 12},
}

every_backend = pytest.mark.parametrize("backend", ["cpu_blocks", "xla"])


def close(actual, expected, tolerance=1e-5):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("options", FAMILIES.values(), ids=FAMILIES)
def test_logits_and_taps_equal_the_independent_ones(options):
    config = toy(**options)
    lm, params, logits_of = build(config)
    params = shaken(params)
    logits = logits_of(params, two_rows())
    taps = jax.jit(lambda params, batch: lm.hidden(params, batch)[1])(params, two_rows())
    expected = [llama(params, document(n, seed), config) for n, seed in ((4, 0), (6, 1), (12, 2))]
    for (b, start), (reference, _) in zip([(0, 0), (0, 4), (1, 0)], expected, strict=True):
        close(logits[b, start : start + len(reference)], reference)
    summed = jax.tree.map(lambda *parts: sum(parts), *(taps for _, taps in expected))
    is_tap = lambda x: isinstance(x, tuple)
    assert jax.tree.structure(summed) == jax.tree.structure(
        jax.tree.map(lambda tap: tap[0], taps, is_leaf=is_tap)
    )
    jax.tree.map(
        lambda tap, reference: close(tap[0], reference),
        taps,
        summed,
        is_leaf=is_tap,
    )
    for path, tap in jax.tree_util.tree_leaves_with_path(taps, is_leaf=is_tap):
        of_experts = any(entry.key == "experts" for entry in path)
        assert np.sum(tap[1]) == 22 * (config.experts_per_token if of_experts else 1)  # tokens
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(taps))


@every_backend
@pytest.mark.parametrize("window", [0, 3])
def test_no_token_changes_what_comes_before_it(backend, window):
    _, params, logits = build(toy(attention=backend, window=window))
    batch = pack([document(12)])
    changed = {**batch, "tokens": batch["tokens"].at[0, 7].add(1)}
    before, after = logits(params, batch)[0], logits(params, changed)[0]
    close(after[:7], before[:7], 1e-6)
    affected = np.any(np.abs(after - before) > 1e-4, axis=1)
    assert affected[7:].all()


@every_backend
@pytest.mark.parametrize("window", [0, 3])
def test_packed_equals_unpacked(backend, window):
    _, params, logits = build(toy(attention=backend, window=window))
    params = shaken(params)
    packed = logits(params, pack([document(4), document(5, 1), document(3, 2)]))[0]
    alone = logits(params, pack([document(4)], [document(5, 1)], [document(3, 2)]))
    close(packed, np.concatenate([alone[0, :4], alone[1, :5], alone[2, :3]]))


@pytest.mark.slow
@every_backend
def test_padding_changes_nothing(backend):
    lm, params, logits = build(toy(attention=backend))
    right = pack([document(8)])
    left = pack([None] * 4 + [document(8)])
    other = {**right, "tokens": right["tokens"].at[0, 8:].set(7)}
    expected = logits(params, pack([document(8)], length=8))[0]
    close(logits(params, right)[0, :8], expected)
    close(logits(params, left)[0, 4:], expected)
    close(logits(params, other)[0, :8], expected)
    assert np.isfinite(logits(params, left)).all()
    value_and_grad = jax.jit(jax.value_and_grad(loss_of(lm), has_aux=True))
    everything = value_and_grad(params, left), value_and_grad(params, pack([]))  # all padding
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(everything))


@pytest.mark.slow
@every_backend
def test_a_window_of_the_whole_length_is_none(backend):
    _, params, full = build(toy(attention=backend))
    _, _, windowed = build(toy(attention=backend, window=12))
    _, _, alone = build(toy(attention=backend, window=1))
    batch = two_rows()
    close(windowed(params, batch), full(params, batch), 1e-6)
    last = {**batch, "tokens": batch["tokens"].at[1, :11].set(5)}
    close(alone(params, last)[1, 11], alone(params, batch)[1, 11])


@pytest.mark.slow
@every_backend
def test_grouped_heads_equal_repeated_ones(backend):
    _, params, grouped = build(toy(attention=backend))
    _, _, full = build(toy(attention=backend, kv_heads=4))
    _, _, default = build(toy(attention=backend, kv_heads=0))
    repeated = jax.tree_util.tree_map_with_path(_repeat_heads, params)
    batch = two_rows()
    close(full(repeated, batch), grouped(params, batch))
    close(default(repeated, batch), full(repeated, batch), 1e-6)


def _repeat_heads(path, leaf):
    if not {"key", "value"} & {entry.key for entry in path}:
        return leaf
    return np.repeat(np.asarray(leaf).reshape(32, 2, 1, 8), 2, axis=2).reshape(32, 32)


@every_backend
def test_only_distances_count(backend):
    _, params, logits = build(toy(attention=backend))
    batch = two_rows()
    shifted = {**batch, "positions": batch["positions"] + 100}
    close(logits(params, shifted), logits(params, batch), 2e-5)


@pytest.mark.slow
def test_soft_caps_by_hand():
    _, params, plain = build(toy())
    _, _, capped = build(toy(logit_soft_cap=0.5))
    logits = plain(shaken(params), two_rows())
    close(capped(shaken(params), two_rows()), 0.5 * np.tanh(logits / 0.5), 1e-6)
    close(layers.soft_cap(jnp.array([0.0, 2.0, 1e9]), 2.0), [0.0, 2 * np.tanh(1.0), 2.0], 1e-6)
    _, _, loose = build(toy(attention_soft_cap=1e4))
    close(loose(params, two_rows()), plain(params, two_rows()))


@pytest.mark.slow
def test_a_tied_head_is_the_table():
    _, tied_params, tied = build(toy())
    _, params, untied = build(toy(tied=False))
    assert "head" not in tied_params
    assert params["head"]["kernel"].shape == (32, 61)
    same = {**tied_params, "head": {"kernel": tied_params["embed"]["table"].T}}
    close(untied(same, two_rows()), tied(tied_params, two_rows()), 1e-6)


def test_a_row_longer_than_the_table_of_positions_is_refused():
    lm = decoder(toy(learned_positions=8), "cpu")
    params = jax.eval_shape(lm.init, jax.random.key(0))
    with pytest.raises(ValueError, match=r"12 tokens do not fit .*learned_positions = 8"):
        jax.eval_shape(lm.hidden, params, two_rows())


@pytest.mark.parametrize("norm", ["rms", "rms_plus_one", "layer"])
def test_norms_start_as_the_same_and_forget_the_scale_of_what_they_read(norm):
    x = jnp.array([[[1.0, 2.0, 3.0, 6.0]]])
    norm = layers.Norm(4, toy(norm=norm, norm_eps=1e-12))
    centred = x - x.mean() if norm.kind == "layer" else x
    close(norm(x), centred / jnp.sqrt(jnp.mean(centred**2)), 1e-6)
    close(norm(1000 * x), norm(x), 1e-6)
    unmoved = bool(np.abs(norm(x + 5) - norm(x)).max() < 1e-5)
    assert unmoved == (norm.kind == "layer")


@pytest.mark.slow
def test_scales_by_hand():
    _, params, plain = build(toy())
    _, _, scaled = build(toy(attention_scale=8**-0.5, embedding_scale=1.0))
    close(scaled(params, two_rows()), plain(params, two_rows()), 1e-5)
    _, _, doubled = build(toy(embedding_scale=2.0))
    twice = {**params, "embed": {"table": 2 * params["embed"]["table"]}}
    close(doubled(params, two_rows()), plain(twice, two_rows()) / 2, 1e-5)

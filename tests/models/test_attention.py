"""Every attention backend against a loop over queries in numpy, and against itself.

Letters: B batch, L length, H query heads, G key/value heads, K head width.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.models import attention

BACKENDS = attention.usable("cpu")
LENGTH = 150  # two whole blocks of `cpu_blocks` and a short one

# Documents' lengths in each of the two rows; the rest of a row is padding.
PACKED = ([70, 9, 71], [150])
SHAPES = {
    "plain": {},
    "grouped": {"kv_heads": 2},
    "one key head": {"kv_heads": 1, "soft_cap": 3.0},
    "window": {"window": 20},
    "window and cap": {"window": 65, "soft_cap": 2.0, "kv_heads": 2},
}


def layout(packed, length=LENGTH):
    """Segments and positions of rows that hold documents of these lengths."""
    segments, positions = np.zeros((2, len(packed), length), np.int32)
    for row, lengths in enumerate(packed):
        start = 0
        for number, size in enumerate(lengths, 1):
            segments[row, start : start + size] = number
            positions[row, start : start + size] = np.arange(size)
            start += size
        positions[row, start:] = np.arange(length - start)
    return {"segments_BL": segments, "positions_BL": positions}


def operands(rows=2, length=LENGTH, heads=4, kv_heads=4, width=8):
    """Query, key, value and a cotangent of the output."""
    keys = jax.random.split(jax.random.key(0), 4)
    sizes = heads, kv_heads, kv_heads, heads
    shapes = [(rows, length, size, width) for size in sizes]
    return [2 * jax.random.normal(*pair) for pair in zip(keys, shapes, strict=True)]


def by_hand(query, key, value, *, segments_BL, positions_BL, window=0, soft_cap=0.0):
    """float64, one query at a time."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    out = np.zeros_like(query)
    B, L, H, K = query.shape
    for b, i, h in np.ndindex(B, L, H):
        distance = positions_BL[b, i] - positions_BL[b]
        seen = (segments_BL[b] == segments_BL[b, i]) & (distance >= 0)
        seen &= (distance < window) if window else True
        g = h * key.shape[2] // H
        scores = key[b, seen, g] @ query[b, i, h] / np.sqrt(K)
        scores = soft_cap * np.tanh(scores / soft_cap) if soft_cap else scores
        weights = np.exp(scores - scores.max())
        out[b, i, h] = weights @ value[b, seen, g] / weights.sum()
    return out


@functools.partial(jax.jit, static_argnames=("backend", "window", "soft_cap"))
def value_and_gradients(query, key, value, d_out, **options):
    """Output, and gradients of query, key and value."""
    fn = functools.partial(attention.attention, **options)
    out, pull = jax.vjp(fn, query, key, value)
    return [out, *pull(d_out)]


def assert_close(ours, others, tolerance=1e-5):
    for one, other in zip(ours, others, strict=True):
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        np.testing.assert_allclose(one, other, atol=tolerance * np.abs(other).max())


@pytest.mark.parametrize("name", SHAPES)
def test_values_by_hand_and_gradients_alike(name):
    shape = dict(SHAPES[name])
    arrays = operands(kv_heads=shape.pop("kv_heads", 4))
    options = layout(PACKED) | shape
    plain = value_and_gradients(*arrays, backend="xla", **options)
    assert_close(plain[:1], [by_hand(*arrays[:3], **options)])
    for backend in BACKENDS:
        assert_close(value_and_gradients(*arrays, backend=backend, **options), plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_documents_equal_documents_alone(backend):
    arrays = operands(rows=1)
    lengths = [70, 70, 10]
    packed = value_and_gradients(*arrays, backend=backend, **layout([lengths]))
    start = 0
    for size in lengths:
        cut = lambda xs: [x[:, start : start + size] for x in xs]  # noqa: B023
        alone = value_and_gradients(*cut(arrays), backend=backend, **layout([[size]], size))
        assert_close(alone, cut(packed))
        start += size


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_changes_nothing_and_stays_finite(backend):
    query, key, value, d_out = operands()
    full = layout([[100], []])  # the second row is all padding
    padded = value_and_gradients(query, key, value, d_out, backend=backend, **full)
    assert all(bool(jnp.isfinite(x).all()) for x in padded)
    other = [x.at[:, 100:].multiply(-3.0) for x in (query, key, value)]
    changed = value_and_gradients(*other, d_out, backend=backend, **full)
    np.testing.assert_array_equal(changed[0][0, :100], padded[0][0, :100])


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_query_sees_a_later_key(backend):
    query, key, value, d_out = operands()
    attend = functools.partial(value_and_gradients, backend=backend, **layout([[LENGTH]] * 2))
    before = attend(query, key, value, d_out)[0]
    after = attend(query, key.at[:, 80:].add(1.0), value.at[:, 80:].add(1.0), d_out)[0]
    np.testing.assert_array_equal(before[:, :80], after[:, :80])
    assert float(jnp.abs(before - after).max(axis=(0, 2, 3))[80:].min()) > 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_is_near_float32(backend):
    coarse = [x.astype(jnp.bfloat16) for x in operands(width=24)]  # its root is not exact either
    fine = [x.astype(jnp.float32) for x in coarse]
    results = value_and_gradients(*coarse, backend=backend, **layout(PACKED))
    assert {x.dtype.name for x in results} == {"bfloat16"}
    assert_close(results, value_and_gradients(*fine, backend=backend, **layout(PACKED)), 0.01)


def test_blocks_keep_less_in_memory():
    arrays = operands(rows=8, length=512, width=16)
    options = layout([[512]] * 8, 512)

    def temporary_bytes(backend):
        lowered = value_and_gradients.lower(*arrays, backend=backend, **options)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    scores = 4 * 8 * 4 * 512 * 512
    assert temporary_bytes("xla") > 4 * scores  # 136 MB
    assert temporary_bytes("cpu_blocks") < scores  # 21 MB


def test_auto_prefers_blocks_on_a_cpu_alone():
    assert attention.resolve("auto", "cpu") == "cpu_blocks"
    assert attention.resolve("auto", "tpu") == attention.resolve("auto", "gpu") == "xla"
    with pytest.raises(ValueError, match="did you mean 'cpu_blocks'"):
        attention.resolve("cpu_block", "cpu")
    with pytest.raises(ValueError, match="on tpu it can be"):
        attention.resolve("cpu_blocks", "tpu")

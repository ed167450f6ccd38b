"""Every attention backend against a loop over queries in numpy, and against itself.

Letters: B batch, L length, H query heads, G key/value heads, K head width.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import sharding
from jaxlm.models import attention, attention_ring
from jaxlm.models.attention import Needs

FAST = "cpu_blocks", "xla"
BACKENDS = [
    name if name in FAST else pytest.param(name, marks=pytest.mark.slow)
    for name in attention.usable("cpu")
]
MESHES = {"ring": sharding.MeshSpec(fsdp=2, sequence=2, tensor=2)}  # the others: one device
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
def compiled(query, key, value, d_out, **options):
    fn = functools.partial(attention.attention, **options)
    out, pull = jax.vjp(fn, query, key, value)
    return [out, *pull(d_out)]


def value_and_gradients(*arrays, backend, mesh=None, **options):
    """Output, and gradients of query, key and value."""
    mesh = mesh or MESHES.get(backend)
    arrays = [np.asarray(x) for x in arrays]  # that no mesh has been laid under yet
    with jax.set_mesh(sharding.make_mesh(mesh)) if mesh else contextlib.nullcontext():
        return [np.asarray(x) for x in compiled(*arrays, backend=backend, **options)]


def assert_close(ours, others, tolerance=1e-5):
    for one, other in zip(ours, others, strict=True):
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        np.testing.assert_allclose(one, other, atol=tolerance * np.abs(other).max())


@functools.cache
def example(name):
    """Operands, options, and what the plain backend makes of them."""
    shape = dict(SHAPES[name])
    arrays = operands(kv_heads=shape.pop("kv_heads", 4))
    options = layout(PACKED) | shape
    return arrays, options, value_and_gradients(*arrays, backend="xla", **options)


@pytest.mark.parametrize("name", SHAPES)
def test_values_by_hand(name):
    arrays, options, plain = example(name)
    assert_close(plain[:1], [by_hand(*arrays[:3], **options)])


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "xla"])
@pytest.mark.parametrize("name", SHAPES)
def test_values_and_gradients_are_alike(name, backend):
    arrays, options, plain = example(name)
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


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_is_near_float32(backend):
    coarse = [x.astype(jnp.bfloat16) for x in operands(width=24)]  # its root is not exact either
    fine = [x.astype(jnp.float32) for x in coarse]
    results = value_and_gradients(*coarse, backend=backend, **layout(PACKED))
    assert {x.dtype.name for x in results} == {"bfloat16"}
    # Splash wants the scale in its queries, which rounds them once more.
    tolerance = 0.015 if "splash" in backend else 0.01
    expected = value_and_gradients(*fine, backend=backend, **layout(PACKED))
    assert_close(results, expected, tolerance)


@pytest.mark.slow
def test_blocks_keep_less_in_memory():
    arrays = operands(rows=8, length=512, width=16)
    options = layout([[512]] * 8, 512)

    def temporary_bytes(backend):
        lowered = compiled.lower(*arrays, backend=backend, **options)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    scores = 4 * 8 * 4 * 512 * 512
    assert temporary_bytes("xla") > 4 * scores  # 136 MB
    assert temporary_bytes("cpu_blocks") < scores  # 21 MB


RINGS = {
    "4 devices": (sharding.MeshSpec(fsdp=1, sequence=4, tensor=2), 152, {"kv_heads": 2}),
    "keys are repeated": (sharding.MeshSpec(fsdp=1, sequence=4, tensor=2), 152, {"kv_heads": 1}),
    "rows stay whole": (sharding.MeshSpec(data=4, fsdp=1, sequence=2), 150, {"window": 20}),
}


@pytest.mark.parametrize("case", [pytest.param(name, marks=pytest.mark.slow) for name in RINGS])
def test_ring_over_other_meshes(case):
    mesh, length, shape = RINGS[case]
    shape = dict(shape)
    arrays = operands(length=length, kv_heads=shape.pop("kv_heads", 4))
    options = layout(PACKED, length) | shape
    ours = value_and_gradients(*arrays, backend="ring", mesh=mesh, **options)
    assert_close(ours, value_and_gradients(*arrays, backend="xla", **options))


@pytest.mark.slow
def test_ring_holds_nothing_of_the_size_of_a_row():
    arrays = operands(rows=1, length=4096, heads=2, kv_heads=2)
    options = layout([[4096]], 4096)
    with jax.set_mesh(sharding.make_mesh(sharding.MeshSpec(fsdp=1, sequence=8))):
        lowered = compiled.lower(*arrays, backend="ring", **options)
    program = lowered.compile()
    run_of_scores = 4 * 2 * 512 * 4096  # one device's queries against all keys
    assert program.memory_analysis().temp_size_in_bytes < run_of_scores
    assert "all-gather" not in program.as_text()


def test_balanced_order_is_undone_and_evens_out_what_is_seen():
    mesh = sharding.make_mesh(sharding.MeshSpec(fsdp=2, sequence=4))
    places = {"tokens": jnp.tile(jnp.arange(16), (2, 1))}
    places |= {"segments": jnp.ones((2, 16), int), "positions": places["tokens"]}
    with jax.set_mesh(mesh):
        assert attention_ring.can_balance(places["tokens"])
        assert not attention_ring.can_balance(places["tokens"][:, :12])
        mixed = attention_ring.balance(places)["positions"]
        back = jax.jit(attention_ring.in_order)(mixed[:, :, None])
    np.testing.assert_array_equal(back[:, :, 0], places["positions"])
    seen = np.asarray(mixed[0]) + 1  # keys that each token sees
    assert set(seen.reshape(4, 4).sum(1)) == {4 * 17 // 2}


def test_auto_follows_platform_mesh_and_rows():
    assert attention.resolve("auto", "cpu") == "cpu_blocks"
    assert attention.resolve("auto", "tpu") == "splash"
    assert attention.resolve("auto", "gpu") == "flash"
    whole = Needs(packed=False, dtype="bfloat16")
    assert attention.resolve("auto", "gpu", whole) == "cudnn"
    assert attention.resolve("auto", "gpu", whole._replace(head_width=256)) == "flash"
    assert attention.resolve("auto", "gpu", whole._replace(soft_cap=9.0)) == "flash"
    for platform in ("cpu", "gpu", "tpu"):
        assert attention.resolve("auto", platform, whole._replace(sequence=2)) == "ring"


REFUSED = [
    ("cpu_block", "cpu", {}, "did you mean 'cpu_blocks'"),
    ("cpu_blocks", "tpu", {}, "on tpu it can be"),
    ("splash", "gpu", {}, "on gpu it can be"),
    ("cudnn", "gpu", {"dtype": "bfloat16"}, "config.data.attend_across_documents=True"),
    ("cudnn", "gpu", {"packed": False}, "config.model.dtype='bfloat16'"),
    ("cudnn", "gpu", {"packed": False, "soft_cap": 1.0}, "attention_soft_cap"),
    ("flash", "gpu", {"sequence": 2}, "take 'ring' or 'auto'"),
    ("splash", "tpu", {"sequence": 2}, "take 'ring' or 'auto'"),
    ("ring", "cpu", {}, "take 'xla' or 'auto'"),
]


@pytest.mark.parametrize(("name", "platform", "needs", "words"), REFUSED)
def test_what_a_backend_cannot_do_is_refused(name, platform, needs, words):
    with pytest.raises(ValueError, match=r"^config\.model\.attention is ") as error:
        attention.resolve(name, platform, Needs(**needs))
    assert words in str(error.value)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_flash_lowers_for_a_gpu(dtype):
    arrays = [x.astype(dtype) for x in operands(kv_heads=2, width=64)]
    options = layout(PACKED) | {"window": 20, "soft_cap": 3.0}
    device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    axes = sharding.MESH_AXES
    mesh = jax.sharding.AbstractMesh((1,) * len(axes), axes, abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = compiled.trace(*arrays, backend="flash", **options)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert all(
        f"flash_{kernel}" in text
        for kernel in ("forward", "backward_of_keys", "backward_of_queries")
    )

"""Products in 8 bits: exact where they hold the numbers, near elsewhere, and in the program."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from toy_decoder import build, loss_of, toy, two_rows

from jaxlm import sharding
from jaxlm.models.products import project

AXES = "embed", "ffn"


def operands(kind, most=127):
    """x [B, L, I], kernel [I, O] and a cotangent [B, L, O]; "whole" ones up to `most`."""
    rng = np.random.default_rng(0)
    shapes = (2, 3, 16), (16, 24), (2, 3, 24)
    if kind == "whole":
        arrays = [rng.integers(1 - most, most, shape) for shape in shapes]
        for x in arrays:  # the largest of what is scaled together is `most`
            x[..., 0] = most
        arrays[1][0] = most
        return [x.astype(np.float32) for x in arrays]
    return [rng.standard_normal(shape, np.float32) for shape in shapes]


@functools.partial(jax.jit, static_argnames="quantize")
def value_and_gradients(x, kernel, d_y, quantize="off"):
    y, pull = jax.vjp(lambda x, kernel: project(x, kernel, *AXES, quantize), x, kernel)
    return y, *pull(d_y)


def distance(a, b):
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


@pytest.mark.parametrize(("quantize", "most"), [("int8", 127), ("fp8", 8)])
def test_whole_numbers_are_exact(quantize, most):
    arrays = operands("whole", most)
    for ours, exact in zip(
        value_and_gradients(*arrays, quantize), value_and_gradients(*arrays), strict=True
    ):
        np.testing.assert_allclose(ours, exact, rtol=1e-6)


def test_others_are_near_and_in_int8_the_gradient_of_the_kernel_is_not_rounded():
    ours, exact = (
        value_and_gradients(*operands("normal"), quantize) for quantize in ("int8", "off")
    )
    for a, b in zip(ours[:2], exact[:2], strict=True):
        assert 1e-4 < distance(a, b) < 0.015
    np.testing.assert_array_equal(ours[2], exact[2])


def test_others_are_near_in_fp8():
    """A number is off by up to 1/16 in e4m3 and 1/8 in e5m2, evenly in between: 2.6 and 5.2 %."""
    ours, exact = (
        value_and_gradients(*operands("normal"), quantize) for quantize in ("fp8", "off")
    )
    for a, b, limit in zip(ours, exact, (0.045, 0.07, 0.07), strict=True):
        assert 0.01 < distance(a, b) < limit


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("size", [1e-30, 1e-3, 1e3, 1e30])
def test_the_scale_of_a_tensor_does_not_matter_to_fp8(size, dtype):
    """Scales are powers of two, so another power of two gives the same digits."""
    size = 2.0 ** round(np.log2(size) * (0.03 if dtype == "float16" else 1))
    x, kernel, d_y = (a.astype(dtype) for a in operands("normal"))
    y, d_x, d_kernel = value_and_gradients(x, kernel, d_y, "fp8")
    larger = value_and_gradients((x * size).astype(dtype), kernel, d_y, "fp8")
    np.testing.assert_array_equal(np.float64(larger[0]), np.float64(y) * size)
    np.testing.assert_array_equal(larger[1], d_x)
    np.testing.assert_array_equal(np.float64(larger[2]), np.float64(d_kernel) * size)


@pytest.mark.parametrize("explicit", [False, True])
def test_devices_share_the_scale_of_a_tensor(explicit):
    """Rows and units split over eight devices, in either axis mode: rounded as on one."""
    x, kernel, d_y = operands("normal")
    x, d_y = (np.concatenate([a, 50 * a]) for a in (x, d_y))
    one = value_and_gradients(x, kernel, d_y, "fp8")
    mesh = sharding.make_mesh(sharding.MeshSpec(fsdp=4, tensor=2), explicit=explicit)
    with jax.set_mesh(mesh):
        place = lambda a, *names: jax.device_put(a, NamedSharding(mesh, sharding.spec_of(*names)))
        many = value_and_gradients(
            place(x, "batch", "length"),
            place(kernel, None, "ffn"),
            place(d_y, "batch", "length", "ffn"),
            "fp8",
        )
    for a, b in zip(many, one, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quantize", ["int8", "fp8"])
def test_a_kernel_of_zeros_gives_zeros(quantize):
    x, kernel, d_y = operands("normal")
    results = value_and_gradients(x, 0 * kernel, d_y, quantize)
    assert not np.asarray(results[0]).any()
    assert all(np.isfinite(x).all() for x in results)


def test_what_is_not_finite_stays_so_in_fp8():
    """The guard against bad steps has to see it."""
    x, kernel, d_y = operands("normal")
    for bad in (np.inf, np.nan):
        x[0, 0, 0] = bad
        assert not np.isfinite(value_and_gradients(x, kernel, d_y, "fp8")[0][0, 0]).any()


@pytest.mark.slow
@pytest.mark.parametrize(
    # int8: output and input gradient of seven kernels; fp8: their gradients too. A scan holds each
    # once.
    ("quantize", "near", "products"),
    [("int8", 0.999, {"xi8>": 14}), ("fp8", 0.97, {"xf8E4M3FN>": 21, "xf8E5M2>": 14})],
)
def test_a_decoder_in_8_bits_has_nearly_the_same_gradient(quantize, near, products):
    params = build(toy(scan_layers="on"))[1]

    def gradient(config):
        lm = build(config)[0]
        step = jax.jit(jax.value_and_grad(lambda p: loss_of(lm)(p, two_rows())[0]))
        return step, step(params)

    _, (loss, exact) = gradient(toy(scan_layers="on"))
    step, (rounded, ours) = gradient(toy(scan_layers="on", quantize=quantize))
    np.testing.assert_allclose(rounded, loss, rtol=0.02)
    a, b = (np.concatenate([x.ravel() for x in jax.tree.leaves(t)]) for t in (ours, exact))
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > near
    dots = [line for line in step.lower(params).as_text().splitlines() if "dot_general" in line]
    for kind, times in products.items():
        assert sum(kind in line for line in dots) == times

"""Products in int8: exact where int8 holds the numbers, near elsewhere, and in the program."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_decoder import build, loss_of, shaken, toy, two_rows

from jaxlm.models.products import project

AXES = "embed", "ffn"


def operands(kind):
    """x [B, L, I], kernel [I, O] and a cotangent [B, L, O]."""
    rng = np.random.default_rng(0)
    shapes = (2, 3, 16), (16, 24), (2, 3, 24)
    if kind == "whole":
        arrays = [rng.integers(-126, 127, shape) for shape in shapes]
        for x in arrays:  # the largest of what is scaled together is 127
            x[..., 0] = 127
        arrays[1][0] = 127
        return [x.astype(np.float32) for x in arrays]
    return [rng.standard_normal(shape, np.float32) for shape in shapes]


@functools.partial(jax.jit, static_argnames="int8")
def value_and_gradients(x, kernel, d_y, int8):
    y, pull = jax.vjp(lambda x, kernel: project(x, kernel, *AXES, int8), x, kernel)
    return y, *pull(d_y)


def test_whole_numbers_are_exact():
    arrays = operands("whole")
    for ours, exact in zip(
        value_and_gradients(*arrays, int8=True),
        value_and_gradients(*arrays, int8=False),
        strict=True,
    ):
        np.testing.assert_allclose(ours, exact, rtol=1e-6)


def test_others_are_near_and_the_gradient_of_the_kernel_is_not_rounded():
    ours, exact = (value_and_gradients(*operands("normal"), int8=int8) for int8 in (True, False))
    for a, b in zip(ours[:2], exact[:2], strict=True):
        assert 1e-4 < float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) < 0.015
    np.testing.assert_array_equal(ours[2], exact[2])


def test_a_kernel_of_zeros_gives_zeros():
    x, kernel, d_y = operands("normal")
    results = value_and_gradients(x, 0 * kernel, d_y, int8=True)
    assert not np.asarray(results[0]).any()
    assert all(np.isfinite(x).all() for x in results)


@pytest.mark.slow
def test_a_decoder_in_int8_has_nearly_the_same_gradient():
    params = shaken(build(toy(scan_layers="on"))[1])

    def gradient(config):
        lm = build(config)[0]
        step = jax.jit(jax.value_and_grad(lambda p: loss_of(lm)(p, two_rows())[0]))
        return step, step(params)

    _, (loss, exact) = gradient(toy(scan_layers="on"))
    step, (near, ours) = gradient(toy(scan_layers="on", quantize="int8"))
    np.testing.assert_allclose(near, loss, rtol=0.02)
    a, b = (np.concatenate([x.ravel() for x in jax.tree.leaves(t)]) for t in (ours, exact))
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.99
    text = step.lower(params).as_text()
    # Output and input gradient of seven kernels; a scan holds each once.
    assert sum("dot_general" in line and "xi8>" in line for line in text.splitlines()) == 14

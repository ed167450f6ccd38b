"""Matrix products of the model, with their gradients written out and their results laid out.

Letters: B batch, L length, I and O what a kernel takes and gives.

With int8 two of the three products of a kernel, its output and the gradient of its input, are of
int8 numbers with int32 sums, which TPUs from v5e and GPUs do at twice the rate of bfloat16. The
gradient of the kernel, a sum over all tokens, stays in the compute dtype, and so do parameters,
moments, attention, embedding and head. As in AQT (github.com/google/aqt) rounding is to the nearest
and its gradient that of the identity. A remat policy that stores products stores the int32 sums.
"""

import functools

import jax
import jax.numpy as jnp

from jaxlm import sharding


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def project(x_BLI, kernel_IO, takes, gives, int8=False):
    """x·W, with its gradient written out, for the order of the operands in that of W.

    JAX puts the cotangent first there, and XLA on a CPU then copies it transposed: a third slower
    in float32, and on jax 0.12 four times in bfloat16, with sums that are off by 2 %.
    """
    return _forward(x_BLI, kernel_IO, takes, gives, int8)[0]


def _forward(x_BLI, kernel_IO, takes, gives, int8):
    # Not `project` again: policies of what to store look for the product itself.
    multiply = functools.partial(int8_product, 0) if int8 else product
    y_BLO = multiply("BLI,IO->BLO", x_BLI, kernel_IO, "batch", "length", _of_activations(gives))
    return y_BLO, (x_BLI, kernel_IO)


def _backward(takes, gives, int8, saved, d_BLO):
    x_BLI, kernel_IO = saved
    multiply = functools.partial(int8_product, 1) if int8 else product
    d_x = multiply("BLO,IO->BLI", d_BLO, kernel_IO, "batch", "length", _of_activations(takes))
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.are_all_axes_explicit:  # a gradient then lies as what it is of
        takes, gives = (None if axis == "embed" else axis for axis in (takes, gives))
    return d_x, product("BLI,BLO->IO", x_BLI, d_BLO, takes, gives)


project.defvjp(_forward, _backward)


def _of_activations(axis):
    return "width" if axis == "embed" else axis


def product(equation, x, y, *logical, **options):
    """`jnp.einsum`, laid out by the logical axes of the result, in either axis mode."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.are_all_axes_explicit:
        spec = sharding.spec_of(*logical)
        return jnp.einsum(equation, x, y, out_sharding=spec, **options)
    return sharding.constrain(jnp.einsum(equation, x, y, **options), *logical)


def int8_product(axis, equation, x, kernel, *logical):
    """`product` of the nearest int8 numbers, over the last axis of x and that axis of the kernel.

    Each token has a scale, and so has each unit that the kernel gives: 127 stands for the largest.
    """
    x_int8, scale_BL1 = _int8(x, x.ndim - 1)
    kernel_int8, scale = _int8(kernel, axis)
    sums = product(equation, x_int8, kernel_int8, *logical, preferred_element_type=jnp.int32)
    return (sums * scale_BL1 * scale.reshape(1, 1, -1)).astype(x.dtype)


def _int8(x, axis):
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=axis, keepdims=True) / 127
    return jnp.round(x / jnp.where(scale == 0, 1.0, scale)).astype(jnp.int8), scale


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def float32_product(equation, x, kernel):
    """`jnp.einsum` with a float32 result, whose gradient runs in the dtype of x.

    JAX would make both products of the gradient float32, as the cotangent is: in bfloat16 the loss
    then takes 1.8 times as long on a CPU.
    """
    return jnp.einsum(equation, x, kernel, preferred_element_type=jnp.float32)


def _float32_forward(equation, x, kernel):
    return float32_product(equation, x, kernel), (x, kernel)


def _float32_backward(equation, saved, d_y):
    x, kernel = saved
    d_y = d_y.astype(x.dtype)
    # Transposed and not differentiated: that would trace, and count, the product once more.
    (d_x,) = jax.linear_transpose(lambda x: jnp.einsum(equation, x, kernel), x)(d_y)
    (d_kernel,) = jax.linear_transpose(lambda kernel: jnp.einsum(equation, x, kernel), kernel)(d_y)
    return d_x, d_kernel


float32_product.defvjp(_float32_forward, _float32_backward)

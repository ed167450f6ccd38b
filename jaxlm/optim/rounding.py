"""Second moments in bfloat16, rounded up or down at random.

v ← b2·v + (1 - b2)·g² changes v by a share of 1 - b2 where gradients are small, and bfloat16's
neighbours lie 2⁻⁸ to 2⁻⁷ apart. Rounded to the nearest, v would not fall at a b2 of 0.999: it was
twice too large after 6,000 steps of random gradients, and stays where it is at 0.9999. So a number
is rounded up with the probability that makes the mean right (https://arxiv.org/abs/1502.02551): the
mean of v is then exact at any rate, and a single one is off by noise, measured as 0.8 % at a b2 of
0.95, 1.2 % at 0.98, 4 % at 0.999 and 5 % at 0.9999, of which an update sees the root: half.

The die is a hash of the number's own bits and of the step, so that it needs no key, costs a few
integer operations, and does not depend on how arrays are cut or laid out.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

SECOND = {"nu", "nu_max"}  # fields of optax's states


class RoundedState(NamedTuple):
    """Steps taken, and the optimizer's state with its second moments in fewer bits."""

    steps: jax.Array
    inner: Any


def second_moments_in_bfloat16(tx: optax.GradientTransformation, name: str):
    """`tx` with second moments stored so; it computes with them in float32.

    Its `init` raises `ValueError` where there are none; `name`: of the optimizer, for that.
    """
    tx = optax.with_extra_args_support(tx)

    def init(params):
        state, found = _of_second(lambda x: x.astype(jnp.bfloat16), tx.init(params))
        if not found:
            raise ValueError(
                f"optimizer.second_moment_dtype is set, but {name} keeps no second moment of each "
                "number that jaxlm knows how to round; leave it empty"
            )
        return RoundedState(jnp.zeros((), jnp.int32), state)

    def update(updates, state, params=None, **extra):
        wide, _ = _of_second(lambda x: x.astype(jnp.float32), state.inner)
        updates, new = tx.update(updates, wide, params, **extra)
        new, _ = _of_second(lambda x: rounded(x, state.steps), new)
        return updates, RoundedState(state.steps + 1, new)

    return optax.GradientTransformationExtraArgs(init, update)


def rounded(x: jax.Array, step: jax.Array) -> jax.Array:
    """float32 numbers in bfloat16: one of the two neighbours, the nearer one more often."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    die = _hash(bits ^ (step.astype(jnp.uint32) * jnp.uint32(0x9E3779B9))) >> 16
    cut = (bits + die) & jnp.uint32(0xFFFF0000)
    there = jax.lax.bitcast_convert_type(cut, jnp.float32)
    return jnp.where(jnp.isfinite(x), there, x).astype(jnp.bfloat16)


def _hash(x):
    """Each of its 32 bits depends on all of x (the constants are those of lowbias32)."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)


def _of_second(fn, state):
    """`fn` of the second moments of a state, and how many there are."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(state)
    second = [bool(SECOND & {getattr(key, "name", "") for key in path}) for path, _ in leaves]
    new = [fn(x) if each else x for (_, x), each in zip(leaves, second, strict=True)]
    return structure.unflatten(new), sum(second)

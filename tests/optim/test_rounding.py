"""Numbers in bfloat16 that are right in the mean."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_build import gradients, spec
from toy import toy

from jaxlm import optim
from jaxlm.optim.rounding import rounded, second_moments_in_bfloat16

STEPS = jnp.arange(4096)


def test_the_mean_of_many_steps_is_the_number():
    x = 2.0 ** jax.random.uniform(jax.random.key(0), (16,), minval=-60, maxval=20)
    found = jax.vmap(rounded, (None, 0))(x, STEPS).astype(jnp.float32)
    apart = found.max(0) - found.min(0)
    assert (found.max(0) >= x).all()
    assert (found.min(0) <= x).all()
    assert (apart <= x * 2.0**-7).all(), "one of the two neighbours"
    # Four standard deviations of the mean of 4,096 dice with two faces.
    np.testing.assert_array_less(np.abs(found.mean(0) - x), apart * 4 * 0.5 / 64 + 1e-45)


def test_what_bfloat16_holds_stays():
    x = jnp.float32([0.0, 1.0, 1.5, 2.0**-100, jnp.inf, jnp.nan])
    found = jax.vmap(rounded, (None, 0))(x, STEPS[:64]).astype(jnp.float32)
    np.testing.assert_array_equal(found, jnp.broadcast_to(x, found.shape))


def test_a_slow_average_falls_where_rounding_to_the_nearest_stands_still():
    """Without gradients, b2 0.999: after 1,000 steps 0.368 of v is left."""
    tx = second_moments_in_bfloat16(optax.scale_by_adam(b2=0.999), "adam")
    start = jnp.linspace(1.0, 2.0, 128, endpoint=False)  # all that bfloat16 has there
    state = tx.init(start)
    state = state._replace(inner=state.inner._replace(nu=start.astype(jnp.bfloat16)))
    zero = jnp.zeros(128)
    step = lambda state, _: (tx.update(zero, state)[1], None)
    nu = jax.lax.scan(step, state, None, 1000)[0].inner.nu
    assert nu.dtype == jnp.bfloat16
    left = nu.astype(jnp.float32) / start
    np.testing.assert_allclose(left.mean(), 0.999**1000, rtol=0.03)
    nearest = (0.999 * start).astype(jnp.bfloat16)
    assert (nearest == start).mean() > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("name", ["muon", "lamb"])
def test_second_moments_take_half_and_move_as_those_in_float32(name):
    lm = toy()
    params = lm.init(jax.random.key(0))
    found = {}
    for kind in ("float32", "bfloat16"):
        tx, _ = optim.build(spec(name=name, second_moment_dtype=kind), 9, lm.axes)
        _, state = tx.update(gradients(params, 1), tx.init(params), params)
        found[kind] = jax.tree.leaves(optax.tree.get_all_with_path(state, "nu"))
    halves = [x for x in found["bfloat16"] if getattr(x, "dtype", None) == jnp.bfloat16]
    wholes = [x for x in found["float32"] if getattr(x, "dtype", None) == jnp.float32]
    assert len(halves) == len(wholes) > 0
    for half, whole in zip(halves, wholes, strict=True):
        np.testing.assert_allclose(half.astype(jnp.float32), whole, rtol=2.0**-7)


def test_an_optimizer_without_them_is_refused():
    tx, _ = optim.build(spec(name="lion", second_moment_dtype="bfloat16"), 9, toy().axes)
    with pytest.raises(ValueError, match="lion keeps no second moment"):
        tx.init(toy().init(jax.random.key(0)))

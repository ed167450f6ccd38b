"""The average of the params, against its closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.methods.ema import ema


def run(values, **knobs):
    method = ema(**knobs)
    start = {"w": jnp.full(2, 10.0, jnp.bfloat16)}
    extras = {name: extra.init(start, None) for name, extra in method.extras.items()}
    for value in values:
        extras = method.between[0].fn({"w": jnp.full(2, value, jnp.bfloat16)}, extras)
    return extras


def test_closed_form():
    extras = run([1.0, 2.0, 3.0], decay=0.15)  # below the ramp's first value, (1 + 1) / (10 + 1)
    expected = 0.15**3 * 10 + 0.85 * (0.15**2 * 1 + 0.15 * 2 + 3)
    np.testing.assert_allclose(extras["ema"]["w"], expected, rtol=1e-6)
    assert extras["ema"]["w"].dtype == jnp.float32
    assert extras["ema_steps"] == 3


def test_ramp():
    np.testing.assert_allclose(run([0.0], decay=0.999)["ema"]["w"], 10 * 2 / 11, rtol=1e-6)


def test_updating_less_often_forgets_as_much():
    seldom = run([0.0] * 2, decay=0.1, every=5)["ema"]["w"]
    np.testing.assert_allclose(seldom, 10 * 0.1**10, rtol=1e-5)


def test_evaluation_scores_the_average_only():
    extras = ema().extras
    assert (extras["ema"].evaluate, extras["ema_steps"].evaluate) == (True, False)
    assert jax.tree.leaves(extras["ema_steps"].axes) == []
    with pytest.raises(ValueError, match="decay is 1"):
        ema(decay=1.0)

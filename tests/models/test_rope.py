"""Rotary positions and their scalings: known answers, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_llama import speeds
from toy_decoder import build, document, pack, shaken, toy

from jaxlm.models import rope
from jaxlm.models.options import resolve

SCALINGS = [
    "linear factor=3",
    "llama3 factor=8 length=64 low=1 high=4",
    "yarn factor=4 length=64",
    "yarn factor=4 length=64 fast=8 slow=2 attention=1.5",
    "dynamic factor=2 length=16",
]


def test_products_depend_on_the_distance_alone():
    query, key = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))

    def score(i, j):
        turn = lambda x, at: rope.turn(x, rope.turns(jnp.array([[at]]), 8, 100.0))
        return float(jnp.sum(turn(query, i) * turn(key, j)))

    np.testing.assert_allclose(score(9, 4), score(105, 100), rtol=1e-5)
    np.testing.assert_allclose(score(0, 0), float(jnp.sum(query * key)), rtol=1e-5)
    assert abs(score(9, 4) - score(9, 5)) > 1e-3


@pytest.mark.parametrize("scaling", SCALINGS)
def test_angles_equal_the_independent_ones(scaling):
    positions_BL = jnp.arange(40)[None]
    cos, sin = rope.turns(positions_BL, 16, 500.0, scaling, jnp.full((1, 40), 40))
    speed, factor = speeds(8, 500.0, scaling, length=40)
    expected = factor * np.exp(1j * np.outer(np.arange(40), speed))
    np.testing.assert_allclose(cos[0] + 1j * sin[0], expected, atol=2e-5)


def test_scaling_leaves_what_it_should():
    plain = rope.turns(jnp.array([[1]]), 16, 500.0)[1][0, 0]
    turned = lambda scaling, length=1: rope.turns(
        jnp.array([[1]]), 16, 500.0, scaling, jnp.array([[length]])
    )[1][0, 0]
    slow = "llama3 factor=8 length=64 low=1 high=4"
    assert turned(slow)[0] == plain[0]  # it turns ten times in 64 positions
    np.testing.assert_allclose(turned(slow)[-1], plain[-1] / 8, rtol=1e-3)
    np.testing.assert_allclose(turned("dynamic factor=2 length=16", 16), plain, rtol=1e-6)
    assert np.all(turned("dynamic factor=2 length=16", 17)[1:] < plain[1:])


@pytest.mark.slow
def test_dynamic_angles_follow_each_document():
    """One longer than the context changes nothing for its neighbour in the row."""
    _, params, logits = build(toy(rope_scaling="dynamic factor=2 length=5"))
    params = shaken(params)
    packed = logits(params, pack([document(4), document(8, 1)]))[0]
    alone = logits(params, pack([document(4)], [document(8, 1)]))
    np.testing.assert_allclose(packed[:4], alone[0, :4], atol=1e-5)
    np.testing.assert_allclose(packed[4:], alone[1, :8], atol=1e-5)
    _, _, plain = build(toy())
    assert np.abs(packed[4:] - plain(params, pack([document(8, 1)]))[0, :8]).max() > 1e-3


REFUSED = [
    ("yarm factor=2", ["did you mean 'yarn'"]),
    ("linear facto=2", ["did you mean 'factor'"]),
    ("linear factor=two", ["factor has to be a number, not 'two'"]),
    ("llama3 factor=8", ["it needs length=..."]),
    ("linear factor=0.5", ["factor has to be finite, and at least 1"]),
    ("linear factor=nan", ["factor has to be finite, and at least 1"]),
    ("dynamic factor=inf length=8", ["factor has to be finite"]),
    ("llama3 factor=8 length=64 low=4 high=4", ["low has to be below high"]),
    ("yarn factor=2 length=64 slow=0", ["slow has to be above 0"]),
    ("yarn factor=2 length=64 slow=32 fast=1", ["fast at least as large"]),
]


@pytest.mark.parametrize(("scaling", "words"), REFUSED)
def test_a_scaling_that_cannot_be_is_refused(scaling, words):
    with pytest.raises(ValueError, match=r"^config\.model\.rope_scaling is") as error:
        resolve(toy(rope_scaling=scaling), "cpu")
    assert all(word in str(error.value) for word in words)

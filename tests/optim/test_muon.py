"""Muon: the updates of optax.contrib, whatever stacks the matrices are put in."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers
from optax.contrib import scale_by_muon as theirs

from jaxlm.optim import muon
from jaxlm.optim.muon import orthogonalize, scale_by_muon

SHAPES = {"q": (16, 16), "k": (16, 16), "up": (16, 48), "gate": (16, 48), "down": (48, 16)}


def normal(shape, seed):
    return jax.random.normal(jax.random.key(seed), shape)


def updates(tx, trees):
    state, out = tx.init(trees[0]), []
    for tree in trees:
        update, state = tx.update(tree, state)
        out.append(update)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("layers", [(), (3,)])
def test_equals_optax(layers, monkeypatch):
    trees = [{n: normal((*layers, *s), i) for n, s in SHAPES.items()} for i in range(3)]
    axes = len(layers), len(layers) + 1
    dimensions = jax.tree.map(lambda _: MuonDimensionNumbers(*axes), trees[0])
    expected = updates(theirs(beta=0.9, weight_dimension_numbers=dimensions), trees)
    layouts = dict.fromkeys(SHAPES, ("rows", "columns"))
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4)
    jax.tree.map(close, updates(scale_by_muon(0.9, 1e-8, layouts), trees), expected)
    monkeypatch.setattr(muon, "STACK", 1)  # each matrix for itself
    jax.tree.map(close, updates(scale_by_muon(0.9, 1e-8, layouts), trees), expected)


@pytest.mark.slow
def test_both_forms_agree_on_a_nearly_singular_matrix():
    left, _, right = jnp.linalg.svd(normal((64, 192), 0), full_matrices=False)
    matrix = ((left * jnp.logspace(0, -6, 64)[None]) @ right)[None]
    scaled = matrix / optax.tree.norm(matrix)
    np.testing.assert_allclose(muon._through_gram(scaled), muon._plainly(scaled), atol=2e-3)


@pytest.mark.slow
def test_singular_values_are_near_one():
    values = jnp.linalg.svd(orthogonalize(normal((2, 96, 40), 1), 1e-8), compute_uv=False)
    assert 0.3 < values.min() < values.max() < 1.3


def test_kernels_of_one_kind_are_stacked():
    leaves = [jnp.zeros(shape) for shape in SHAPES.values()]
    layouts = [("embed", "heads"), ("embed", "heads"), *[("embed", "ffn")] * 2, ("ffn", "embed")]
    assert list(muon._stacks(leaves, layouts)) == [[0, 1], [2, 3], [4]]

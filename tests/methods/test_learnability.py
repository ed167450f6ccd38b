"""Learnability: scores equal brute force; nothing filtered is nothing changed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import batch, toy

from jaxlm.methods.learnability import learnability

LM = toy()
PARAMS, REFERENCE = (LM.init(jax.random.key(seed)) for seed in (0, 1))


def select(rows, **knobs):
    method = learnability(reference="run", **knobs)
    extras = {name: e.init(PARAMS, lambda path: REFERENCE) for name, e in method.extras.items()}
    return method.select(LM, PARAMS, extras, rows, jax.random.key(2))


def brute_force(rows, i):
    def loss(params):
        row = {name: x[i : i + 1] for name, x in rows.items()}
        logprobs = jax.nn.log_softmax(LM.unembed(params, LM.hidden(params, row)[0])[0])
        picked = logprobs[jnp.arange(12), row["targets"][0]] * row["weights"][0]
        return -picked.sum() / row["weights"].sum()

    return loss(PARAMS) - loss(REFERENCE)


def test_keeps_the_rows_that_brute_force_ranks_highest():
    rows = batch(rows=12)
    kept, metrics = select(rows, filter_ratio=0.75)
    scores = np.array([brute_force(rows, i) for i in range(12)])
    best = np.sort(np.argsort(-scores)[:3])
    np.testing.assert_array_equal(kept["index"], best)
    for name, x in kept.items():
        np.testing.assert_array_equal(x, rows[name][best], err_msg=name)
    np.testing.assert_allclose(metrics["select/learnability"], scores[best].mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["select/learnability_of_all"], scores.mean(), rtol=1e-4)


def test_filter_ratio_zero_keeps_everything_in_order():
    rows = batch(rows=4)
    kept, _ = select(rows, filter_ratio=0.0)
    jax.tree.map(np.testing.assert_array_equal, kept, rows)


@pytest.mark.slow
def test_padding_rows_are_the_last_choice():
    rows = {name: x.at[:5].set(0) for name, x in batch(rows=8).items()}
    kept, metrics = select(rows, filter_ratio=0.5)
    assert set(np.array(kept["index"])) >= {5, 6, 7}
    assert np.isfinite(metrics["select/learnability"])


@pytest.mark.slow
def test_noise_draws_without_replacement():
    kept, _ = select(batch(rows=12), filter_ratio=0.5, noise=100.0)
    assert len(set(np.array(kept["index"]))) == 6


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"filter_ratio": 0.7}, "the nearest that does is 0.6667"),
        ({"filter_ratio": 1.0}, "filter_ratio is 1.0"),
        ({"reference": ""}, "name the work folder"),
        ({"noise": -1.0}, "noise is -1.0"),
    ],
)
def test_refused(knobs, said):
    with pytest.raises(ValueError, match=said):
        learnability(**{"reference": "run", **knobs})
    assert learnability(reference="run").oversample == 5

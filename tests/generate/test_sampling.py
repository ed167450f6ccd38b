"""What each filter leaves, by known answers and by what holds of any logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.generate.sampling import Sampling, choose, filtered, penalized

PROBS = np.array([0.1, 0.4, 0.2, 0.25, 0.05], np.float32)
LOGITS_BV = np.log(PROBS)[None]


def kept(sampling, logits_BV=LOGITS_BV):
    """The tokens that stay in the first row."""
    left_BV = filtered(sampling.kind, sampling.numbers, jnp.asarray(logits_BV))
    return set(np.flatnonzero(np.isfinite(left_BV[0])).tolist())


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), {0, 1, 2, 3, 4}),
        (Sampling(top_k=1), {1}),
        (Sampling(top_k=3), {1, 2, 3}),
        (Sampling(top_k=99), {0, 1, 2, 3, 4}),
        (Sampling(top_p=0.0), {1}),
        (Sampling(top_p=0.39), {1}),
        (Sampling(top_p=0.41), {1, 3}),
        (Sampling(top_p=0.9), {0, 1, 2, 3}),
        (Sampling(min_p=0.3), {1, 2, 3}),
        (Sampling(min_p=1.0), {1}),
        (Sampling(top_k=4, top_p=0.8), {1, 2, 3}),  # of what top-k leaves: 0.4, 0.25, 0.2 of 0.95
        (Sampling(top_k=2, min_p=0.6), {1, 3}),
    ],
)
def test_known_answers(sampling, expected):
    assert kept(sampling) == expected


def test_as_likely_stays_too():
    assert kept(Sampling(top_k=1), np.zeros((1, 3), np.float32)) == {0, 1, 2}


def test_the_penalty_divides_what_speaks_for_a_seen_token():
    logits_BV = jnp.array([[2.0, 2.0, -1.0, -1.0]])
    seen_BV = jnp.array([[True, False, True, False]])
    np.testing.assert_allclose(penalized(logits_BV, seen_BV, 1.25), [[1.6, 2.0, -1.25, -1.0]])


# In eighths: no two so near that their probabilities are one float.
logits = st.lists(st.integers(-64, 64).map(lambda n: n / 8), min_size=5, max_size=5)


@settings(deadline=None, max_examples=60)
@given(logits, st.integers(1, 6), st.floats(0.05, 0.99), st.floats(0.01, 1))
def test_filters_keep_the_likeliest_and_what_they_promise(values, top_k, top_p, min_p):
    logits_BV = np.array([values], np.float32)
    probs = np.exp(logits_BV[0]) / np.exp(logits_BV[0]).sum()
    best = set(np.flatnonzero(probs == probs.max()).tolist())
    for sampling in (Sampling(top_k=top_k), Sampling(top_p=top_p), Sampling(min_p=min_p)):
        left = kept(sampling, logits_BV)
        assert best <= left
        out = set(range(5)) - left
        assert all(probs[i] > probs[j] for i in left for j in out)
    assert len(kept(Sampling(top_k=top_k), logits_BV)) >= min(top_k, 5)
    nucleus = kept(Sampling(top_p=top_p), logits_BV)
    assert probs[list(nucleus)].sum() >= top_p - 1e-5
    least = min(probs[i] for i in nucleus)
    assert probs[probs > least].sum() < top_p + 1e-5  # none of them could go
    likely = set(np.flatnonzero(probs >= min_p * probs.max() * (1 + 1e-5)).tolist())
    assert likely <= kept(Sampling(min_p=min_p), logits_BV)


@pytest.mark.slow
def test_a_row_draws_by_its_own_key_from_what_is_left():
    sampling = Sampling(temperature=0.5, top_k=3)
    keys_B = jax.vmap(jax.random.key)(jnp.arange(4000, dtype=jnp.uint32))
    rows_BV = jnp.broadcast_to(LOGITS_BV, (4000, 5))
    drawn_B = choose(sampling.kind, sampling.numbers, rows_BV, keys_B)
    expected = np.where(np.isin(np.arange(5), (1, 2, 3)), PROBS**2, 0)
    shares = np.bincount(drawn_B, minlength=5) / 4000
    np.testing.assert_allclose(shares, expected / expected.sum(), atol=0.03)
    alone = choose(sampling.kind, sampling.numbers, rows_BV[:1], keys_B[7:8])
    assert alone[0] == drawn_B[7]


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"temperature": -1}, "temperature=-1 has to be at least 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": -1}, "top_k=-1 has to be at least 0"),
        ({"top_p": 1.1}, "top_p=1.1 has to be at least 0 and at most 1"),
        ({"min_p": 2}, "min_p=2 has to be at least 0 and at most 1"),
        ({"repetition_penalty": 0}, "repetition_penalty=0 has to be more than 0"),
    ],
)
def test_knobs_that_mean_nothing_are_refused(knobs, words):
    with pytest.raises(ValueError, match=words):
        Sampling(**knobs)

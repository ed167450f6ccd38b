"""Batches of prompts with responses, responses drawn from models, and what they score."""

import functools

import jax
import numpy as np
import pytest

from jaxlm.studies import models, texts

END = 0


@functools.cache
def voice():
    lm = models.model(16, 16, 1)
    params = jax.tree.map(lambda p: 3 * p, models.fresh(lm, 2))
    return lm, params, texts.Voice(lm, prompt=3, tokens=5, end=END)


def test_weights_are_on_the_response():
    batch = texts.batch([[7], [8, 9]], [[3, 4, END], [5, END]], 4)
    np.testing.assert_array_equal(batch["tokens"], [[7, 3, 4, 0], [8, 9, 5, 0]])
    np.testing.assert_array_equal(batch["targets"], [[3, 4, END, 0], [9, 5, END, 0]])
    np.testing.assert_array_equal(batch["weights"], [[1, 1, 1, 0], [0, 1, 1, 0]])
    np.testing.assert_array_equal(batch["segments"], [[1, 1, 1, 0], [1, 1, 1, 0]])


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="6 tokens of prompt and response"):
        texts.batch([[1, 2]], [[3, 4, 5, END]], 4)


@pytest.mark.slow
def test_responses_end_where_they_should_and_differ_between_seeds():
    _, params, speak = voice()
    drawn = speak.draw(params, [[1], [2, 3, 4]] * 8, seed=1)
    assert [len(responses) for responses in drawn] == [16, 16]
    for response in (*drawn[0], *drawn[1]):
        assert 1 <= len(response) <= 5
        assert END not in response[:-1]
        assert response[-1] == END or len(response) == 5
    assert drawn[0] != drawn[1]
    assert drawn == speak.draw(params, [[1], [2, 3, 4]] * 8, seed=1)


@pytest.mark.slow
def test_scores_are_the_chances_that_responses_are_drawn_with():
    """All responses of one or two tokens: their chances, and those of all others, add up to 1."""
    _, params, speak = voice()
    every = [[END], *([first, second] for first in range(1, 16) for second in range(16))]
    scores_SB = speak.score(params, [[5]] * len(every), [every, every])
    np.testing.assert_allclose(np.exp(scores_SB).sum(1), 1, atol=1e-5)
    often = np.array([r == [END] for r in speak.draw(params, [[5]] * 2000, seed=2)[0]])
    chance = float(np.exp(scores_SB[0, 0]))
    assert abs(often.mean() - chance) < 4 * np.sqrt(chance * (1 - chance) / 2000) + 1e-9

"""Schedules: known values, and what is refused."""

import numpy as np
import pytest

from jaxlm.optim.schedules import make_schedule


def curve(kind, steps=10, **knobs):
    schedule = make_schedule(kind, peak=2.0, steps=steps, **knobs)
    return np.array([schedule(i) for i in range(steps)])


def test_constant_after_warmup():
    np.testing.assert_allclose(curve("constant", warmup_steps=4)[:5], [0.5, 1, 1.5, 2, 2])


def test_cosine_is_half_way_down_in_the_middle():
    rates = curve("cosine", final_fraction=0.2)
    np.testing.assert_allclose(rates[[0, 5]], [2.0, 1.2], rtol=1e-6)
    assert np.all(np.diff(rates) < 0)
    assert rates[-1] > 0.4


def test_linear_falls_over_the_last_share():
    rates = curve("linear", decay_fraction=0.5)
    np.testing.assert_allclose(rates, [2] * 5 + [2, 1.6, 1.2, 0.8, 0.4], rtol=1e-6)


def test_wsd_falls_as_one_minus_the_root():
    rates = curve("wsd", decay_fraction=0.4)
    np.testing.assert_allclose(rates[5:8], [2, 2, 2 * (1 - 0.25**0.5)], rtol=1e-6)


def test_the_fall_starts_after_a_long_warmup():
    rates = curve("linear", warmup_steps=8, decay_fraction=0.9)
    np.testing.assert_allclose(rates[7:], [2, 2, 1], rtol=1e-6)


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"kind": "cosin"}, "did you mean 'cosine'"),
        ({"warmup_steps": 11}, "warmup_steps is 11 in a run of 10 steps"),
        ({"peak": 0.0}, "learning_rate must be positive"),
        ({"decay_fraction": 0.0}, "decay_fraction is 0.0"),
        ({"final_fraction": 1.5}, "final_fraction is 1.5"),
        ({"steps": 0}, "at least one step"),
    ],
)
def test_refused(knobs, said):
    knobs = {"kind": "cosine", "peak": 1.0, "steps": 10} | knobs
    with pytest.raises(ValueError, match=said):
        make_schedule(knobs.pop("kind"), **knobs)

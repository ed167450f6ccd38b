"""What a run decides by its metrics does not depend on the clock of a process."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import journal as journals
from jaxlm.metrics import Clock


class Nobody:
    """Console and writer in one, who listen to nothing."""

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


def verdicts(in_row, every, start=0):
    """What the journal says after each step: of updates skipped in a row, and of the last."""
    journal = journals.Journal(
        Nobody(),
        Nobody(),
        Clock(),
        start=start,
        steps=start + len(in_row),
        every=every,
        tokens_per_step=1,
        chars_per_token=lambda step: 1.0,
        flops_per_step=1.0,
        peak_flops_of_all=1.0,
        learning_rates=np.ones(start + len(in_row)),
        minutes=0.0,
        weights=lambda step: {},
    )
    found = []
    for step, count in enumerate(in_row, start + 1):
        zero = jnp.zeros(())
        numbers = {"loss": zero, "skipped": zero, "skipped_in_row": jnp.int32(count)}
        journal.step(step, numbers)
        found.append(journal.skipped_in_row)
    journal.fetch()
    return found, journal.skipping


@pytest.mark.parametrize("start", [0, 3])
def test_the_clock_decides_nothing(monkeypatch, start):
    in_row = [0, 1, 2, 3, 0, 0, 1, 0, 0, 0, 1, 2]
    monkeypatch.setattr(journals, "FETCH_SECONDS", 0.0)
    eager = verdicts(in_row, 4, start)
    monkeypatch.setattr(journals, "FETCH_SECONDS", 1e9)
    assert verdicts(in_row, 4, start) == eager
    assert max(eager[0]) == 3
    assert eager[1]


def test_a_row_that_ended_between_two_looks_is_seen():
    assert verdicts([1, 2, 0, 0, 0, 0, 0, 0], 4) == ([0, 0, 0, 2, 2, 2, 2, 0], False)

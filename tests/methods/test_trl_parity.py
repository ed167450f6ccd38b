"""Losses over preferences and fine-tuning against what TRL's trainers gave for the same batch.

The committed figures were made by tools/preference_parity.py, which also says where TRL differs.
"""

import json
import pathlib

import jax
import numpy as np
import pytest
from trl_cases import STEPS, Sides, in_short

LIMIT = 1e-4
FIXTURE = pathlib.Path(__file__).parents[1] / "fixtures" / "trl.json"
THEIRS = json.loads(FIXTURE.read_text())["cases"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    with jax.default_matmul_precision("highest"):
        yield Sides(tmp_path_factory.mktemp("models"))


def assert_alike(ours, theirs):
    """Norm and weighted sum of each tensor."""
    assert ours.keys() == theirs.keys()
    for tensor, (size, total) in theirs.items():
        norm, weighted = ours[tensor]
        assert abs(norm - size) < LIMIT * max(size, 1e-3), tensor
        assert abs(weighted - total) < LIMIT * max(size, 1e-3), tensor


# Of those that differ in the last formula alone one; make parity goes through all.
TESTED = ("dpo sigmoid", "dpo ipo", "simpo", "orpo", "kto", "sft, packed")


@pytest.mark.parametrize("name", TESTED)
def test_loss_rewards_and_gradients_are_those_of_trl(name, sides):
    ours, theirs = sides.figures(name), dict(THEIRS[name])
    assert_alike(in_short(ours.pop("gradients")), theirs.pop("gradients"))
    assert ours.keys() == theirs.keys()
    for figure, value in ours.items():
        np.testing.assert_allclose(value, theirs[figure], rtol=0, atol=LIMIT, err_msg=figure)


def test_a_reference_follows_as_trls_callback_lets_it(sides):
    losses, _, reference = sides.follow()
    theirs = THEIRS["dpo + follow"]
    assert len(losses) == STEPS
    np.testing.assert_allclose(losses, theirs["losses"], rtol=0, atol=LIMIT)
    assert_alike(in_short(reference), theirs["reference"])

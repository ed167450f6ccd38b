"""The trainer of the studies: DPO's known answers, seeds that do not meet, nothing missed."""

import functools
import math

import jax
import numpy as np
import pytest

from jaxlm.contract import compose
from jaxlm.methods.dpo import dpo
from jaxlm.methods.follow import follow
from jaxlm.optim import OptimizerSpec
from jaxlm.studies import models, texts

pytestmark = pytest.mark.slow  # all but the last compile

STEPS, EVERY, BETA = 12, 4, 0.5
DPO = dpo(beta=BETA)


@functools.cache
def trainer():
    lm = models.model(16, 16, 1)
    spec = OptimizerSpec(learning_rate=0.01, schedule="constant", weight_decay=0.0)
    return lm, models.Trainer(lm, DPO, spec, STEPS, 4)


def pairs(seed):
    rng = np.random.default_rng(seed)
    prompts = [[1] for _ in range(16)]
    member = lambda: texts.batch(prompts, rng.integers(2, 16, (16, 3)).tolist(), 5)
    return texts.stacked([member(), member()], axis=1)


def run(method=None, seeds=(0, 1)):
    lm, train = trainer()
    start = models.fresh(lm, len(seeds))
    return train(start, [pairs(seed) for seed in seeds], method, every=EVERY)


def leaves(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def test_a_reference_that_follows_after_the_end_is_plain_dpo_bitwise():
    plain, said = run()
    late, said_late = run(compose(DPO, follow(every=EVERY * 1000, alpha=1.0)))
    for one, other in zip(leaves(plain.params), leaves(late.params), strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(said["loss"], said_late["loss"])


def test_alpha_0_is_plain_dpo_bitwise():
    plain, _ = run()
    still, _ = run(compose(DPO, follow(every=EVERY, alpha=0.0)))
    for one, other in zip(leaves(plain.params), leaves(still.params), strict=True):
        np.testing.assert_array_equal(one, other)


def test_one_step_after_a_hard_update_dpo_begins_anew():
    _, said = run(compose(DPO, follow(every=EVERY, alpha=1.0)))
    begins = [0, EVERY, 2 * EVERY]
    np.testing.assert_allclose(said["loss"][:, begins], math.log(2), atol=1e-6)
    np.testing.assert_allclose(said["dpo/margin"][:, begins], 0, atol=1e-5)
    _, plain = run()
    assert (plain["loss"][:, EVERY] < 0.69).all()  # which a fixed reference does not
    soft = run(compose(DPO, follow(every=EVERY, alpha=0.6)))[1]["loss"][:, EVERY]
    assert (plain["loss"][:, EVERY] < soft).all()
    assert (soft < math.log(2)).all()


def test_the_state_seen_after_a_hard_update_has_the_policy_as_its_reference():
    seen = {}
    lm, train = trainer()
    look = lambda step, state: seen.update({step: jax.device_get(state)})
    hard = compose(DPO, follow(every=2 * EVERY, alpha=1.0))
    train(models.fresh(lm, 2), [pairs(0), pairs(1)], hard, every=EVERY, look=look)
    assert list(seen) == [0, 4, 8, 12]
    same = lambda s: all(map(np.array_equal, leaves(s.params), leaves(s.extras["reference"])))
    assert [same(state) for state in seen.values()] == [True, False, True, False]


def test_seeds_do_not_meet():
    both, _ = run(seeds=(0, 1))
    other, _ = run(seeds=(0, 7))  # the second one's data differ
    for one, another in zip(leaves(both.params), leaves(other.params), strict=True):
        np.testing.assert_array_equal(one[0], another[0])
    of_both = zip(leaves(both.params), leaves(other.params), strict=True)
    assert any((one[1] != another[1]).any() for one, another in of_both)


def test_updates_between_chunks_are_refused():
    with pytest.raises(ValueError, match="every 6 steps would be missed"):
        run(compose(DPO, follow(every=6, alpha=1.0)))


def test_an_order_takes_each_row_once_an_epoch():
    rows = models.order(6, 4, 3, seed=1)
    assert rows.shape == (3, 4)
    assert sorted(rows.ravel()[:6]) == sorted(rows.ravel()[6:]) == list(range(6))

"""The step on a linear model, whose every number is known by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.contract import LM, Aux, Between, Extra, Method, copy_of_params
from jaxlm.step import init_state, make_between, make_score, make_step

LINEAR = LM(lambda key: {"w": jnp.ones((3,))}, None, None, {"w": (None,)})


def squares(lm, params, extras, batch, key):
    """Weighted sum of (x·w)^2, to be divided by the sum of weights."""
    y_B = batch["x"] @ params["w"]
    loss = jnp.sum(batch["weight"] * y_B**2)
    of_two_B = (batch["weight"] == 2).astype(jnp.float32)
    own = jnp.sum(of_two_B * y_B), of_two_B.sum()
    return loss, Aux(batch["weight"].sum(), {"y": jnp.sum(batch["weight"] * y_B), "own": own})


def take(steps, *, batch, accumulate=1, tx=None, **options):
    tx = optax.with_extra_args_support(tx or optax.adam(0.1))
    method = Method(squares)
    state = init_state(LINEAR.init(None), method, tx)
    step = make_step(LINEAR, method, tx, accumulate=accumulate, **options)
    found = []
    for i in range(steps):
        state, metrics = step(state, batch(i), jax.random.key(0))
        found.append(jax.device_get(metrics))
    assert step._cache_size() == 1
    return state, found


def rows(i, bad=None):
    x = np.random.default_rng(i).normal(size=(8, 3)).astype(np.float32)
    if i == bad:
        x[3, 1] = np.nan
    return {"x": x, "weight": np.array([1, 0, 2, 1, 0, 0, 5, 1], np.float32)}


def test_uneven_micro_batches_weigh_what_they_should():
    one, metrics_one = take(4, batch=rows)
    four, metrics_four = take(4, batch=rows, accumulate=4)
    np.testing.assert_allclose(one.params["w"], four.params["w"], rtol=1e-6)
    for a, b in zip(metrics_one, metrics_four, strict=True):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-6)
        np.testing.assert_allclose(a["y"], b["y"], rtol=1e-5, atol=1e-6)
        assert a["weight"] == b["weight"] == 10
        np.testing.assert_allclose(a["own"], b["own"], rtol=1e-5)
    np.testing.assert_allclose(metrics_one[0]["own"], rows(0)["x"][2].sum(), rtol=1e-5)


def test_sums_of_gradients_have_the_dtype_asked_for():
    """At w = 0 the gradient of (x·w - 1)² is -2x: 512 and then 2, of which bfloat16 keeps 512."""

    def objective(lm, params, extras, batch, key):
        loss = jnp.sum((batch["x"] @ params["w"] - 1) ** 2)
        return loss, Aux(jnp.float32(0.5), {})

    lm, tx = LM(lambda key: {"w": jnp.zeros(3)}, None, None, {"w": (None,)}), optax.sgd(1.0)
    tx = optax.with_extra_args_support(tx)
    batch = {"x": np.float32([[256, 0, 1], [1, 1, 1]])}
    moved = {}
    for sums in ("float32", "bfloat16"):
        state = init_state(lm.init(None), Method(objective), tx)
        step = make_step(lm, Method(objective), tx, accumulate=2, sums=sums)
        moved[sums] = step(state, batch, jax.random.key(0))[0].params["w"]
    np.testing.assert_array_equal(moved["float32"], [514, 2, 4])
    np.testing.assert_array_equal(moved["bfloat16"], [512, 2, 4])


def test_an_evaluation_sums_what_a_step_divides():
    score = make_score(LINEAR, Method(squares))
    found = score(LINEAR.init(None), {}, rows(0))
    y_B = rows(0)["x"].sum(1)
    np.testing.assert_allclose(found["y"], (y_B @ rows(0)["weight"], 10), rtol=1e-5)
    np.testing.assert_allclose(found["loss"], (y_B**2 @ rows(0)["weight"], 10), rtol=1e-5)
    np.testing.assert_allclose(found["own"], (y_B[2], 1), rtol=1e-5)


def test_a_non_finite_update_is_skipped_and_counted():
    before, _ = take(2, batch=lambda i: rows(i, bad=2))
    after, metrics = take(3, batch=lambda i: rows(i, bad=2))
    np.testing.assert_array_equal(before.params["w"], after.params["w"])
    np.testing.assert_array_equal(before.opt_state[0].mu["w"], after.opt_state[0].mu["w"])
    assert after.opt_state[0].count == 3, "what schedules read goes on"
    assert (after.step, metrics[-1]["skipped"], metrics[-1]["skipped_in_row"]) == (3, 1, 1)
    more, metrics = take(4, batch=lambda i: rows(i, bad=2))
    assert (metrics[-1]["skipped"], metrics[-1]["skipped_in_row"]) == (1, 0)
    assert np.isfinite(more.params["w"]).all()


def test_numbers_of_an_update_that_are_not_finite_are_left_out_and_it_is_counted():
    batch = lambda i: rows(i) | {"x": rows(i)["x"] * np.float32([1, 0, 1])}  # w[1] moves by 0 / 0
    after, metrics = take(3, batch=batch, tx=optax.adam(0.1, eps=0.0))
    assert np.isfinite([[m["loss"], m["norm/grads"]] for m in metrics]).all()
    assert [m["skipped_in_row"] for m in metrics] == [1, 2, 3]
    assert after.params["w"][1] == 1
    assert np.isfinite(after.params["w"]).all()


@pytest.mark.parametrize("sigmas", [0.0, 8.0])
def test_a_spike_is_skipped_only_when_asked(sigmas):
    def batch(i):
        b = rows(i)
        return b | {"x": b["x"] * (1000 if i == 130 else 1)}

    _, metrics = take(132, batch=batch, tx=optax.sgd(0.0), spike_sigmas=sigmas)
    assert metrics[-1]["skipped"] == (1 if sigmas else 0)


def test_a_loss_that_is_no_sum_over_rows_is_not_accumulated():
    with pytest.raises(ValueError, match="accumulate must be 1"):
        make_step(LINEAR, Method(squares, separable=False), optax.sgd(1.0), accumulate=2)
    with pytest.raises(ValueError, match="no objective"):
        make_step(LINEAR, Method(), optax.sgd(1.0))


def test_between_runs_on_its_cadence_and_leaves_the_rest():
    fn = lambda params, extras: {"moving": jax.tree.map(lambda p: p + 1, params)}
    extras = {name: Extra(copy_of_params) for name in ("moving", "fixed")}
    method = Method(squares, extras=extras, between=(Between(3, ("moving",), fn),))
    tx = optax.with_extra_args_support(optax.sgd(0.0))
    state = init_state(LINEAR.init(None), method, tx)
    between = make_between(method)
    fixed = state.extras["fixed"]["w"]
    for step in (1, 2):
        state = between(step, state)
        assert state.extras["moving"]["w"].tolist() == [1, 1, 1]
    state = between(3, state)
    assert state.extras["moving"]["w"].tolist() == [2, 2, 2]
    assert state.extras["fixed"]["w"] is fixed
    assert state.params["w"].tolist() == [1, 1, 1]

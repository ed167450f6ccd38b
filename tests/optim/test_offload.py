"""Updates made a part at a time are those made at once."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_build import after, close, gradients, spec
from toy import toy

from jaxlm import optim, sharding
from jaxlm.optim.state import owners, state_axes, state_shardings


@pytest.mark.slow
@pytest.mark.parametrize(("name", "scan"), [("adamw", False), ("amsgrad", True), ("muon", True)])
def test_parts_in_turn_are_one_update(name, scan):
    lm = toy(scan=scan, layers=3)
    params = lm.init(jax.random.key(0))
    grads = [gradients(params, seed) for seed in (1, 2)]
    at_once = optim.build(spec(name=name), 9, lm.axes)[0]
    in_turn = optim.build(spec(name=name, offload=True), 9, lm.axes)[0]
    close(after(in_turn, params, grads), after(at_once, params, grads), rtol=1e-5, atol=1e-6)


def test_what_is_not_taken_stays_part_by_part():
    lm = toy(scan=True)
    params = lm.init(jax.random.key(0))
    tx = optim.build(spec(offload=True), 9, lm.axes)[0]
    before = tx.init(params)
    keep = lambda new, old: jax.tree.map(lambda n, o: n if n.ndim == 0 else o, new, old)
    update = jax.jit(lambda g, s, p: tx.update(g, s, p, keep=keep))
    _, state = update(gradients(params, 1), before, params)
    for new, old in zip(jax.tree.leaves(state), jax.tree.leaves(before), strict=True):
        assert (new == old + 1) if new.ndim == 0 else (new == old).all()


def test_a_wrap_that_drops_what_keeps_moments_is_refused():
    """Moments on the host are kept by nobody else: NaN would stay in them, and nothing be said."""
    lm = toy(scan=True)
    params = jax.eval_shape(lm.init, jax.random.key(0))
    tx = optim.build(spec(offload=True), 9, lm.axes)[0]
    mesh = sharding.make_mesh(sharding.MeshSpec())
    layout = sharding.in_host_memory(
        state_axes(tx, params, lm.axes), state_shardings(tx, params, lm.axes, mesh)
    )
    place = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
    state = jax.tree.map(place, jax.eval_shape(tx.init, params), layout)
    keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(jnp.isfinite(n), n, o), new, old)

    def trace(wrap):
        wrapped = optax.with_extra_args_support(wrap(tx))
        jax.jit(lambda g, s, p: wrapped.update(g, s, p, keep=keep)).trace(params, state, params)

    trace(lambda tx: tx)
    trace(lambda tx: optax.GradientTransformationExtraArgs(tx.init, tx.update))
    with pytest.raises(ValueError, match=r"offload=True.*GradientTransformationExtraArgs"):
        trace(lambda tx: optax.GradientTransformation(tx.init, lambda *a: tx.update(*a)))


def test_moments_belong_to_params_and_counts_to_all():
    lm = toy(scan=True)
    params = lm.init(jax.random.key(0))
    tx = optim.build(spec(), 9, lm.axes)[0]
    number = len(jax.tree.leaves(params))
    of = owners(tx, params)
    assert [i for i in of if i is not None] == 2 * list(range(number))
    counts = [x for x, i in zip(jax.tree.leaves(tx.init(params)), of, strict=True) if i is None]
    assert all(x.dtype == jnp.int32 and np.ndim(x) == 0 for x in counts)

"""What the seams cost: the composed step against one written by hand for the same model."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.contract import compose
from jaxlm.methods import METHODS
from jaxlm.models.transformer import DecoderConfig, decoder
from jaxlm.optim.build import OptimizerSpec, build
from jaxlm.step import init_state, make_step

CONFIG = DecoderConfig(vocabulary=256, width=64, layers=2, heads=2, scan_layers="off")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def parts():
    lm = decoder(CONFIG, "cpu")
    tx, _ = build(OptimizerSpec(rules="embed|norm: weight_decay=0.1"), 10, lm.axes)
    ones = np.ones((16, 64), np.int32)
    names = ("tokens", "targets", "segments", "positions")
    batch = dict.fromkeys(names, ones) | {"weights": ones.astype(np.float32)}
    return lm, tx, batch


def compiled(lm, method, tx, batch):
    state = jax.eval_shape(lambda k: init_state(lm.init(k), method, tx), jax.random.key(0))
    return make_step(lm, method, tx).lower(state, batch, jax.random.key(0)).compile()


def flops(program):
    found = program.cost_analysis()
    return (found[0] if isinstance(found, list) else found)["flops"]


def by_hand(lm, batch):
    """What somebody would write for this model alone, with optax."""
    tx = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(1e-3, b1=0.9, b2=0.95, weight_decay=0.1)
    )

    def loss(params):
        hidden_BLD, _, _ = lm.hidden(params, batch)
        logits_BLV = lm.unembed(params, hidden_BLD).astype(jnp.float32)
        each = optax.softmax_cross_entropy_with_integer_labels(logits_BLV, batch["targets"])
        return jnp.sum(each * batch["weights"]) / batch["weights"].sum()

    def step(params, opt_state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        norms = optax.tree.norm(grads), optax.tree.norm(updates)
        return optax.apply_updates(params, updates), opt_state, value, norms

    params = jax.eval_shape(lm.init, jax.random.key(0))
    opt_state = jax.eval_shape(tx.init, params)
    return jax.jit(step, donate_argnums=(0, 1)).lower(params, opt_state).compile()


def test_the_composed_step_does_the_work_of_a_hand_written_one(parts):
    lm, tx, batch = parts
    ours = flops(compiled(lm, METHODS["next_token"](), tx, batch))
    assert ours <= 1.01 * flops(by_hand(lm, batch))


def test_taps_cost_nothing_until_a_method_reads_them(parts):
    lm, tx, batch = parts
    method = METHODS["next_token"]()
    silent = lm._replace(hidden=lambda *a: (lm.hidden(*a)[0], None, {}))
    plain = compiled(silent, method, tx, batch)
    assert flops(compiled(lm, method, tx, batch)) == flops(plain)
    gated = compose(method, METHODS["migu"](threshold=0.5))
    read = compiled(lm, gated, gated.wrap(tx), batch)
    assert flops(plain) < flops(read) < 1.05 * flops(plain)

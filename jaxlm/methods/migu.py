"""MIGU (https://arxiv.org/abs/2406.17245): update only the units that speak loudest.

For a kernel with output units 1..d, let n_i be the mean |output| of unit i over the tokens of the
step (accumulated micro-batches included). t = floor(threshold · d) units are frozen: the gradient
of their columns is set to zero, so that exactly d - t columns of each kernel are updated.

Kernels of attention and MLP are masked, each layer by its own ranking, stacked or not. Embeddings,
norms, biases and head are not, as in the paper (its code also masks the head).

Of adapters (`lora`) B's columns are ranked by what their kernel gives, A's by what A gives, but for
experts', where that is not told: their A is not masked.

Where the mask stands: on the gradient, before clipping and optimizer, as in the paper and its code.
So momentum and weight decay still move frozen units. `mask_updates` holds them entirely still.

Differences: padding is left out of the mean (the authors' code counts it); ties go by position, so
that the count is exact (theirs keeps all that reach the quantile). They train the first task
unmasked and switch the mask on from the second: here these are two runs, the second initialised
from the first. The paper has no random-mask control, and masking 70 % also shortens every step:
compare at the best learning rate of each arm.
"""

import jax
import jax.numpy as jnp
import optax

from jaxlm.contract import Method

PARTS = {"attention", "mlp"}


def migu(*, threshold: float = 0.7, mask_updates: bool = False) -> Method:
    """`threshold`: the paper's T, the share of output units that is frozen; 0 = plain optimizer."""
    if not 0 <= threshold < 1:
        raise ValueError(
            f"threshold is {threshold}; give the share that is frozen, from 0 to below 1"
        )

    def update(updates, state, params=None, **beside):
        del params
        loudness = _by_path(beside.get("taps"))

        def mask(path, update):
            if path not in loudness:
                return update
            return jnp.where(_loudest(loudness[path], threshold)[..., None, :], update, 0)

        return jax.tree_util.tree_map_with_path(mask, updates), state

    gate = optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
    after = (gate,) if mask_updates else ()
    return Method(wrap=lambda tx: optax.chain(gate, tx, *after))


def _by_path(taps):
    """Path of each masked kernel -> summed |output| per unit, [d] or [layers, d].

    Sums rank as means do: within a kernel all units have seen the same tokens.
    """
    leaves = jax.tree_util.tree_leaves_with_path(taps, is_leaf=lambda x: isinstance(x, tuple))
    found = {path: tap[0] for path, tap in leaves if PARTS & {key.key for key in path}}
    if not found:
        raise ValueError("migu reads the model's taps, but this objective hands none on in its Aux")
    return found


def _loudest(loudness, threshold):
    """True for all but the floor(threshold · d) quietest of the last axis."""
    quiet = int(threshold * loudness.shape[-1] + 1e-6)  # 0.29 · 100 is 28.999... in binary
    rank = jnp.argsort(jnp.argsort(loudness, axis=-1), axis=-1)
    return rank >= quiet

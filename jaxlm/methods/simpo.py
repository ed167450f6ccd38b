"""SimPO (https://arxiv.org/abs/2405.14734, equation 6): preferences without a reference.

    loss = -log σ(beta · [log p(chosen) / |chosen| - log p(rejected) / |rejected|] - margin)

The reward is the log-probability per token, so length earns nothing by itself. `margin` is the
paper's γ and TRL's simpo_gamma; the authors' code is given γ/beta. Batch: pairs, as
`methods.responses` has them.
"""

import jax
import jax.numpy as jnp

from jaxlm.contract import Method
from jaxlm.methods.responses import responses, summed


def simpo(*, beta: float = 2.0, margin: float = 1.0) -> Method:
    """`beta`: scale of the reward, per nat and token; `margin`: what the chosen one should lead
    by, in the same scale."""
    if not beta > 0 or margin < 0:
        raise ValueError(f"beta is {beta} and margin {margin}: beta is above 0, margin not below")

    def objective(lm, params, extras, batch, key):
        del extras
        policy = responses(lm, params, batch, key)
        reward_P2 = beta * policy.mean_P2
        lead_P = reward_P2[:, 0] - reward_P2[:, 1]
        metrics = {
            "accuracy": (lead_P > 0).astype(jnp.float32),
            "margin": lead_P,
            "reward_chosen": reward_P2[:, 0],
            "reward_rejected": reward_P2[:, 1],
        }
        return summed("simpo", -jax.nn.log_sigmoid(lead_P - margin), policy, metrics)

    return Method(objective=objective, reads="pairs")

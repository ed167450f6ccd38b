"""ORPO (https://arxiv.org/abs/2403.07691, equations 4 to 7): fine-tuning that also prefers.

    odds(y) = p / (1 - p),  log p = log-probability per token of the response
    loss = -log p(chosen) - ratio_weight · log σ(log odds(chosen) - log odds(rejected))

No reference. The first term is each chosen response's mean over its tokens; TRL takes the mean over
all tokens of the batch's chosen texts, prompts included. The odds are the same. Batch: pairs, as
`methods.responses` has them.
"""

import jax
import jax.numpy as jnp

from jaxlm.contract import Method
from jaxlm.methods.responses import responses, summed


def orpo(*, ratio_weight: float = 0.1) -> Method:
    """`ratio_weight`: the paper's λ, the share of the odds ratio next to the likelihood."""
    if not ratio_weight >= 0:
        raise ValueError(f"ratio_weight is {ratio_weight}, and must be 0 or more")

    def objective(lm, params, extras, batch, key):
        del extras
        policy = responses(lm, params, batch, key)
        odds_P2 = policy.mean_P2 - jnp.log(-jnp.expm1(jnp.minimum(policy.mean_P2, -1e-6)))
        ratio_P = odds_P2[:, 0] - odds_P2[:, 1]
        nll_P = -policy.mean_P2[:, 0]
        metrics = {
            "accuracy": (ratio_P > 0).astype(jnp.float32),
            "log_odds_ratio": ratio_P,
            "nll_chosen": nll_P,
        }
        loss_P = nll_P - ratio_weight * jax.nn.log_sigmoid(ratio_P)
        return summed("orpo", loss_P, policy, metrics)

    return Method(objective=objective, reads="pairs")

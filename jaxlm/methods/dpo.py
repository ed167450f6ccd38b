"""Direct preference optimisation (https://arxiv.org/abs/2305.18290, equation 7).

    z = beta · [(log p - log p_ref)(chosen) - (log p - log p_ref)(rejected)]
    loss = -log sigmoid(z)

Log-probabilities are sums over a response's tokens, given its prompt. The reference is the params
the run starts from, frozen; compose with `follow` to let it follow (TR-DPO). As in the paper no
length normalisation, no label smoothing.

Batch: P pairs; member 0 of each is the chosen response, member 1 the rejected, after one prompt.
Both go through the model as rows of one batch.
  tokens, targets, weights, segments, positions   [P, 2, L]   weights are 1 on response tokens
A row holds one sequence, not packed documents. A pair without any weight is padding.
Loss and metrics are per pair.
"""

import jax
import jax.numpy as jnp

from jaxlm.contract import Aux, Extra, Method, copy_of_params
from jaxlm.methods.likelihood import token_logprobs

FIELDS = ("tokens", "targets", "weights", "segments", "positions")


def dpo(*, beta: float = 0.1) -> Method:
    """`beta`: the pull towards the reference, in 1/nats; large stays near it."""
    if not beta > 0:
        raise ValueError(f"beta is {beta}, and must be positive")

    def objective(lm, params, extras, batch, key):
        frozen = jax.lax.stop_gradient(extras["reference"])
        policy_P2, taps, penalties = _response_logprobs(lm, params, batch, key)
        reference_P2, _, _ = _response_logprobs(lm, frozen, batch, None)
        reward_P2 = beta * (policy_P2 - reference_P2)
        margin_P = reward_P2[:, 0] - reward_P2[:, 1]
        pair_P = jnp.any(batch["weights"] > 0, axis=(1, 2)).astype(jnp.float32)
        weight = pair_P.sum()
        metrics = {
            "dpo/accuracy": jnp.sum(jnp.where(margin_P > 0, pair_P, 0.0)),
            "dpo/margin": jnp.sum(pair_P * margin_P),
            "dpo/reward_chosen": jnp.sum(pair_P * reward_P2[:, 0]),
            "dpo/reward_rejected": jnp.sum(pair_P * reward_P2[:, 1]),
            "dpo/logprob_chosen": jnp.sum(pair_P * policy_P2[:, 0]),
            "dpo/logprob_rejected": jnp.sum(pair_P * policy_P2[:, 1]),
        }
        metrics |= {name: weight * penalty for name, penalty in penalties.items()}
        loss = -jnp.sum(pair_P * jax.nn.log_sigmoid(margin_P))
        return loss + weight * sum(penalties.values()), Aux(weight, metrics, taps)

    return Method(objective=objective, reads="pairs", extras={"reference": Extra(copy_of_params)})


def _response_logprobs(lm, params, batch, key):
    """log p(response | prompt) of each member, [P, 2]; then taps and penalties."""
    rows = {name: batch[name].reshape(-1, batch[name].shape[-1]) for name in FIELDS}
    logprobs_BL, taps, penalties = token_logprobs(lm, params, rows, key)
    return (logprobs_BL * rows["weights"]).sum(-1).reshape(-1, 2), taps, penalties

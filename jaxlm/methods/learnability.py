"""Train on the rows that are still to be learned: learnability selection.

Of a super-batch the rows with the highest score are kept,

    score = loss under the params now - loss under a reference model       (nats per token)

so neither what is already known nor what even the reference finds hard (noise). The score is that
of JEST (https://arxiv.org/abs/2406.17711) and of RHO-LOSS (https://arxiv.org/abs/2206.07137). JEST
picks rows *jointly*, through the cross terms of a contrastive loss; a language-model loss is a sum
over rows and has none, so the joint choice is the choice of the best rows, and this is RHO-LOSS.

Differences: scored without dropout; nothing is cached, the reference is run on every super-batch
(at a ratio of 0.8 and counting a forward pass as 1, a step costs 5 + 5 + 3 where a plain one costs
3). Kept rows stay in the order they came in. For audits and for exact repetition: with `noise` 0
the choice is a function of the super-batch and the two models; `index` and `source` of the kept
rows are those arrays of the batch that the objective sees.

S rows of the super-batch, B = S / oversample rows that are kept, L positions.
"""

import jax
import jax.numpy as jnp

from jaxlm import sharding
from jaxlm.contract import Extra, Method
from jaxlm.methods.likelihood import token_logprobs


def learnability(*, filter_ratio: float = 0.8, reference: str = "", noise: float = 0.0) -> Method:
    """Keeps 1 - `filter_ratio` of the rows; the ratio is 1 - 1/k for a whole k.

    `reference`: work folder or checkpoint of the reference model, of the same shape. `noise` > 0
    draws rows without replacement, by odds exp(score / noise), instead of taking the best.
    """
    oversample = _oversample(filter_ratio)
    if not reference:
        raise ValueError(
            "reference is empty; name the work folder of a finished run to compare with"
        )
    if not noise >= 0:
        raise ValueError(f"noise is {noise}; it may not be negative")

    def select(lm, params, extras, batch, key):
        learner_S = _row_losses(lm, params, batch, oversample)
        reference_S = _row_losses(lm, extras["scorer"], batch, oversample)
        score_S = learner_S - reference_S
        drawn_S = score_S + noise * jax.random.gumbel(key, score_S.shape) if noise else score_S
        empty_S = batch["weights"].sum(-1) == 0  # padding rows come last
        keep = score_S.size // oversample
        order_S = jnp.where(empty_S, -jnp.inf, drawn_S)
        _, rows_B = jax.lax.top_k(sharding.constrain(order_S, None), keep)  # of all devices' rows
        rows_B = jnp.sort(rows_B)
        metrics = {
            "select/learnability": sharding.take_rows(score_S, rows_B, "batch").mean(),
            "select/learnability_of_all": score_S.mean(),
            "select/learner_loss_of_all": learner_S.mean(),
            "select/reference_loss_of_all": reference_S.mean(),
        }
        take = lambda x: sharding.take_rows(x, rows_B, "batch", *(None,) * (x.ndim - 1))
        return jax.tree.map(take, dict(batch)), metrics

    def load_reference(params, load):
        del params
        return load(reference)

    return Method(select=select, oversample=oversample, extras={"scorer": Extra(load_reference)})


def _oversample(filter_ratio):
    """Rows seen for each row kept. Raises `ValueError` where that is no whole number."""
    if not 0 <= filter_ratio < 1:
        raise ValueError(
            f"filter_ratio is {filter_ratio}; give the share left out, from 0 to below 1"
        )
    rows = round(1 / (1 - filter_ratio))
    if abs(1 - 1 / rows - filter_ratio) > 5e-3:
        raise ValueError(
            f"filter_ratio {filter_ratio} keeps no whole number of rows in one; the nearest that "
            f"does is {1 - 1 / rows:.4g}"
        )
    return rows


def _row_losses(lm, params, batch, chunks):
    """Mean loss per token of each row in nats, [S], scored S / chunks rows at a time."""
    params = jax.lax.stop_gradient(params)

    def score(rows):
        logprobs_BL, _, _ = token_logprobs(lm, params, rows)
        return -jnp.sum(rows["weights"] * logprobs_BL, -1) / jnp.maximum(
            rows["weights"].sum(-1), 1.0
        )

    # Every chunks-th row, not a run of them: rows of one device stay on it.
    split = lambda x: x.reshape(-1, chunks, *x.shape[1:]).swapaxes(0, 1)
    losses_NB = jax.lax.map(score, {name: split(x) for name, x in batch.items()})
    return losses_NB.swapaxes(0, 1).reshape(-1)

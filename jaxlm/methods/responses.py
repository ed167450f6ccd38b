"""What preference methods share: log-probabilities of whole responses, and what to log of them.

P pairs, two members each, L positions. A batch holds
  tokens, targets, weights, segments, positions   [P, 2, L]   weights are 1 on response tokens
A row holds one prompt with one response, not packed documents; both members go through the model as
rows of one batch. A pair without any weight is padding and counts nothing.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.contract import LM, Aux, Batch, Column, Extra, Extras, Params, copy_of_params
from jaxlm.methods.likelihood import token_logprobs

FIELDS = ("tokens", "targets", "weights", "segments", "positions")


class Responses(NamedTuple):
    """What a model says of both members of each pair."""

    logprob_P2: jax.Array  # of the whole response given its prompt, in nats
    length_P2: jax.Array  # tokens of the response
    real_P: jax.Array  # 1; 0 = padding
    taps: object
    penalties: dict[str, jax.Array]

    @property
    def mean_P2(self) -> jax.Array:
        """Log-probability per token of each response."""
        return self.logprob_P2 / jnp.maximum(self.length_P2, 1)


def responses(lm: LM, params: Params, batch: Batch, key: jax.Array | None = None) -> Responses:
    """Reads both members of each pair, or the one that the batch has, in one pass."""
    rows = {name: batch[name].reshape(-1, batch[name].shape[-1]) for name in FIELDS}
    logprobs_BL, taps, penalties = token_logprobs(lm, params, rows, key)
    length_P2 = batch["weights"].sum(-1)
    logprob_P2 = (logprobs_BL * rows["weights"]).sum(-1).reshape(length_P2.shape)
    real_P = jnp.any(batch["weights"] > 0, axis=(1, 2)).astype(jnp.float32)
    return Responses(logprob_P2, length_P2, real_P, taps, penalties)


def frozen(lm: LM, params: Params, batch: Batch) -> Responses:
    """The same of params that get no gradient, such as a reference's."""
    return responses(lm, jax.lax.stop_gradient(params), batch)


class Reference(NamedTuple):
    """A copy of the params of the start, or what they said of each record."""

    extras: dict[str, Extra]
    columns: dict[str, Column]
    logprob_P2: Callable[[LM, Extras, Batch], jax.Array]
    """(lm, extras, batch) -> its log-probabilities of the responses."""


def reference_of(kind: str) -> Reference:
    """A "live" one, or a "precomputed" one. Raises `ValueError` for another kind."""
    if kind not in ("live", "precomputed"):
        raise ValueError(f"reference is {kind!r}, and may be 'live' or 'precomputed'")
    if kind == "live":
        live = lambda lm, extras, batch: frozen(lm, extras["reference"], batch).logprob_P2
        return Reference({"reference": Extra(copy_of_params)}, {}, live)

    def fn(lm, params, batch):
        return {"reference": frozen(lm, params, batch).logprob_P2}

    kept = {"reference": Column(fn, "log-probabilities of both responses")}
    return Reference({}, kept, lambda lm, extras, batch: batch["reference"])


def summed(
    name: str,
    loss_P: jax.Array,
    policy: Responses,
    metrics_P: dict[str, Any],
    members: tuple[str, ...] = ("chosen", "rejected"),
) -> tuple[jax.Array, Aux]:
    """An objective's return value: the loss and each metric summed over the real pairs.

    `metrics_P` get the prefix `name`; log-probability and length of the `members` come with them.
    A metric may be (x_P, weight_P), to be the mean of x weighed so.
    """
    real_P = policy.real_P
    total = lambda x_P: jnp.sum(jnp.where(real_P > 0, x_P, 0.0))
    weight = real_P.sum()
    of_members = {
        f"{what}_{member}": x_P2[:, i]
        for what, x_P2 in (("logprob", policy.logprob_P2), ("length", policy.length_P2))
        for i, member in enumerate(members)
    }
    both = lambda x: (total(x[0] * x[1]), total(x[1])) if isinstance(x, tuple) else total(x)
    metrics = {f"{name}/{key}": both(x) for key, x in (metrics_P | of_members).items()}
    metrics |= {key: weight * penalty for key, penalty in policy.penalties.items()}
    penalty = weight * sum(policy.penalties.values())
    return total(loss_P) + penalty, Aux(weight, metrics, policy.taps)

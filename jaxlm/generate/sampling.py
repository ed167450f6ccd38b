"""From the logits of a token to the token: greedy, or drawn from what the filters leave.

Letters: B rows, V vocabulary.

The filters and their order are Hugging Face's: repetition penalty, temperature, top-k, top-p,
min-p; but tokens as likely as the last one kept stay too, where they drop some of them.
A row draws from its own key and the number of tokens it has drawn, so its text does not depend on
the rows beside it.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Kind(NamedTuple):
    """What of a `Sampling` the program depends on; its numbers are arguments."""

    greedy: bool
    top_k: int
    top_p: bool
    min_p: bool
    penalty: bool


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. The defaults draw from the model as it is."""

    temperature: float = 1.0  # divides the logits; 0 = the likeliest token
    top_k: int = 0  # of the likeliest tokens that stay; 0 = all
    top_p: float = 1.0  # the fewest likeliest tokens that have this probability together stay
    min_p: float = 0.0  # tokens stay that are this likely, against the likeliest
    repetition_penalty: float = 1.0  # divides what speaks for a token that the row has already

    def __post_init__(self):
        for name, low, high in (
            ("temperature", 0, float("inf")),
            ("top_k", 0, float("inf")),
            ("top_p", 0, 1),
            ("min_p", 0, 1),
        ):
            value = getattr(self, name)
            if not low <= value <= high or value == float("inf"):
                most = f" and at most {high}" if high == 1 else " and finite"
                raise ValueError(f"{name}={value} has to be at least {low}{most}")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(
                f"repetition_penalty={self.repetition_penalty} has to be more than 0; 1 = none"
            )

    @property
    def kind(self) -> Kind:
        greedy, penalty = self.temperature == 0, self.repetition_penalty != 1
        if greedy:
            return Kind(True, 0, False, False, penalty)
        return Kind(False, self.top_k, self.top_p < 1, self.min_p > 0, penalty)

    @property
    def numbers(self) -> dict[str, float]:
        """What the compiled program takes as arguments."""
        names = "temperature", "top_p", "min_p", "repetition_penalty"
        return {name: float(getattr(self, name)) for name in names}


def choose(kind: Kind, numbers, logits_BV, key_B, seen_BV=None) -> jax.Array:
    """The next token of each row, [B] int32. `seen_BV`: tokens the row has, for the penalty."""
    if kind.penalty:
        logits_BV = penalized(logits_BV, seen_BV, numbers["repetition_penalty"])
    if not kind.greedy:
        logits_BV = filtered(kind, numbers, logits_BV / numbers["temperature"])
        shape = logits_BV.shape[1:]
        logits_BV += jax.vmap(lambda key: jax.random.gumbel(key, shape, jnp.float32))(key_B)
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)


def penalized(logits_BV, seen_BV, penalty):
    """Logits of seen tokens, closer to 0 where above it and further from it where below."""
    less_BV = jnp.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
    return jnp.where(seen_BV, less_BV, logits_BV)


def filtered(kind: Kind, numbers, logits_BV):
    """Logits, -inf for tokens that a filter drops; the likeliest always stays."""
    keep_if = lambda kept_BV: jnp.where(kept_BV, logits_BV, -jnp.inf)
    if kind.top_k:
        best_BK = jax.lax.top_k(logits_BV, min(kind.top_k, logits_BV.shape[-1]))[0]
        logits_BV = keep_if(logits_BV >= best_BK[:, -1:])
    if kind.top_p:
        probs_BV = jax.nn.softmax(logits_BV, axis=-1)
        falling_BV = -jnp.sort(-probs_BV, axis=-1)
        before_BV = jnp.cumsum(falling_BV, axis=-1) - falling_BV
        kept_BV = (before_BV < numbers["top_p"]).at[:, 0].set(True)
        floor_B1 = jnp.min(jnp.where(kept_BV, falling_BV, jnp.inf), axis=-1, keepdims=True)
        logits_BV = keep_if(probs_BV >= floor_B1)
    if kind.min_p:
        # By probability, not its logarithm, to agree on what is exactly as likely as asked.
        probs_BV = jax.nn.softmax(logits_BV, axis=-1)
        top_B1 = jnp.max(probs_BV, axis=-1, keepdims=True)
        logits_BV = keep_if(probs_BV >= numbers["min_p"] * top_B1)
    return logits_BV

"""Rotary positions (RoPE, arXiv 2104.09864), and what stretches them over longer contexts.

Letters: B batch, L length, H heads, K head width.

`config.model.rope_scaling` is a kind and its numbers, "yarn factor=4 length=4096":
  linear   factor                    all angles divided by it (arXiv 2306.15595)
  llama3   factor length low high    only the slow pairs: those that turn less than `low` times in
                                     `length` positions; up to `high` times the division fades out
  yarn     factor length [fast slow truncate attention]
                                     likewise, by the index of the pair (arXiv 2309.00071), and what
                                     is turned is multiplied by `attention`
  dynamic  factor length             a document longer than `length` gets a larger theta (NTK)
`length` is the context before stretching, in positions. Values are those of Hugging Face configs.

Dynamic angles depend on the length of the text: here on that of each document, so that a packed or
padded row means what it means alone. Hugging Face takes the longest row of a batch for all. Next
to a cache the length is that of the newest token, as there: older keys keep their angles.
"""

import difflib
import math
from typing import Any

import jax
import jax.numpy as jnp

# Kind -> its numbers and their defaults; None has to be given. 0 for `attention`: by the factor.
KINDS = {
    "linear": {"factor": None},
    "llama3": {"factor": None, "length": None, "low": 1.0, "high": 4.0},
    "yarn": {
        "factor": None,
        "length": None,
        "fast": 32.0,
        "slow": 1.0,
        "truncate": 1.0,
        "attention": 0.0,
    },
    "dynamic": {"factor": None, "length": None},
}

LEAST = {"factor": 1.0, "length": 1.0}


def parse(text: str) -> tuple[str, dict[str, float]]:
    """Kind and numbers of a scaling; ("", {}) of an empty one. Raises `ValueError` in words."""
    if not text.strip():
        return "", {}
    where = f"config.model.rope_scaling is {text!r}"
    kind, *settings = text.split()
    if kind not in KINDS:
        raise ValueError(f"{where}, but {_near(kind, KINDS)}")
    numbers = dict(KINDS[kind])
    for setting in settings:
        key, _, value = setting.partition("=")
        if key not in numbers:
            raise ValueError(f"{where}: {kind} has no {key!r}; {_near(key, numbers)}")
        try:
            numbers[key] = float(value)
        except ValueError:
            raise ValueError(f"{where}: {key} has to be a number, not {value!r}.") from None
    if missing := [key for key, value in numbers.items() if value is None]:
        raise ValueError(f"{where}: it needs {' and '.join(f'{key}=...' for key in missing)}.")
    for key, value in numbers.items():
        least = LEAST.get(key, 0.0)
        if not least <= value < math.inf:
            raise ValueError(f"{where}: {key} has to be finite, and at least {least:g}.")
    if kind == "llama3" and not numbers["low"] < numbers["high"]:
        raise ValueError(f"{where}: low has to be below high: between them the division fades out.")
    if kind == "yarn" and not 0 < numbers["slow"] <= numbers["fast"]:
        raise ValueError(f"{where}: slow has to be above 0, and fast at least as large.")
    return kind, numbers


def turns(positions_BL, width: int, theta: float, scaling: str = "", lengths_BL: Any = None):
    """Cosine and sine of each pair's angle at each position, [B, L, width/2] float32 each.

    `lengths_BL`: of the documents that the positions are in; only dynamic scaling reads it.
    """
    kind, numbers = parse(scaling)
    pairs_K = jnp.arange(width // 2, dtype=jnp.float32)
    exponent_K = -2.0 * pairs_K / width
    factor = 1.0
    if kind == "dynamic":
        more_BL = jnp.maximum(lengths_BL.astype(jnp.float32) / numbers["length"], 1.0)
        stretch_BL = numbers["factor"] * more_BL - (numbers["factor"] - 1)
        theta_BL = theta * stretch_BL ** (width / (width - 2))
        speed = theta_BL[:, :, None] ** exponent_K[None, None]
    else:
        speed = theta**exponent_K
        if kind == "linear":
            speed = speed / numbers["factor"]
        elif kind == "llama3":
            speed = _llama3(speed, **numbers)
        elif kind == "yarn":
            speed, factor = _yarn(speed, theta, **numbers)
        speed = speed[None, None]
    angle_BLK = positions_BL.astype(jnp.float32)[:, :, None] * speed
    cos_BLK, sin_BLK = jnp.cos(angle_BLK), jnp.sin(angle_BLK)
    return (cos_BLK, sin_BLK) if factor == 1 else (factor * cos_BLK, factor * sin_BLK)


def turn(x_BLHK: jax.Array, turns_BLK: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the pairs (k, k + R/2) of the first R units of each head, R as many as `turns` has.

    The pairing is Hugging Face's, not the paper's. The other units stay.
    """
    cos_BL1K, sin_BL1K = (part_BLK[:, :, None, :] for part_BLK in turns_BLK)
    width = 2 * cos_BL1K.shape[-1]
    left, right = jnp.split(x_BLHK[..., :width].astype(jnp.float32), 2, axis=-1)
    turned = (left * cos_BL1K - right * sin_BL1K, right * cos_BL1K + left * sin_BL1K)
    turned = jnp.concatenate(turned, axis=-1).astype(x_BLHK.dtype)
    if width == x_BLHK.shape[-1]:
        return turned
    return jnp.concatenate([turned, x_BLHK[..., width:]], axis=-1)


def _llama3(speed_K, factor, length, low, high):
    rounds_K = length * speed_K / (2 * math.pi)  # full turns within the old context
    kept_K = jnp.clip((rounds_K - low) / (high - low), 0.0, 1.0)
    return speed_K * (kept_K + (1 - kept_K) / factor)


def _yarn(speed_K, theta, factor, length, fast, slow, truncate, attention):
    """Speeds, and what cosine and sine are multiplied by."""
    width = 2 * len(speed_K)

    def pair(rounds):
        """The pair that turns so many times within the old context, between two of them."""
        return width * math.log(length / (rounds * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair(fast), pair(slow)
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    steps = max(last - first, 0.001)
    kept_K = 1 - jnp.clip((jnp.arange(len(speed_K)) - first) / steps, 0.0, 1.0)
    speed_K = speed_K * (kept_K + (1 - kept_K) / factor)
    return speed_K, attention or 0.1 * math.log(factor) + 1


def _near(name, names):
    near = difflib.get_close_matches(name, names, 1)
    return f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names)}."

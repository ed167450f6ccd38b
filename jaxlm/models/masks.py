"""Which key each query sees in packed rows. Letters: B batch, L query length, M key length."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

MASKED = -1e30  # finite: a row without any visible key then stays free of NaN
PADDING = 2**30  # stands for segment 0 in `Places`


class Places(NamedTuple):
    """Where tokens stand: their document within the row, and their place within the document."""

    segments_BL: jax.Array
    positions_BL: jax.Array


class Bounds(NamedTuple):
    """The first and last segment and position of each run of tokens."""

    segments: tuple[jax.Array, jax.Array]
    positions: tuple[jax.Array, jax.Array]


def visible(segments_BL, positions_BL, window: int) -> jax.Array:
    """Whether a query sees a key, [B, L, M] bool: same document, not later, within the window."""
    places = Places(segments_BL, positions_BL)
    return visible_between(places, places, window)


def visible_between(queries: Places, keys: Places, window: int) -> jax.Array:
    """`visible`, of queries and keys that stand in different places."""
    same_BLM = queries.segments_BL[:, :, None] == keys.segments_BL[:, None, :]
    distance_BLM = queries.positions_BL[:, :, None] - keys.positions_BL[:, None, :]
    seen_BLM = same_BLM & (distance_BLM >= 0)
    return seen_BLM & (distance_BLM < window) if window else seen_BLM


def document_lengths(places: Places) -> jax.Array:
    """Of the document that each token is in, counted from position 0, [B, L]."""
    same_BLM = places.segments_BL[:, :, None] == places.segments_BL[:, None, :]
    return 1 + jnp.max(jnp.where(same_BLM, places.positions_BL[:, None, :], 0), axis=2)


def padding_last(segments_BL: jax.Array) -> jax.Array:
    """Segments with that of padding, 0, as the highest, so that they rise along a packed row."""
    return jnp.where(segments_BL == 0, PADDING, segments_BL)


def bounds(places: Places) -> Bounds:
    """Over the last axis."""
    ends = lambda x: (jnp.min(x, axis=-1), jnp.max(x, axis=-1))
    return Bounds(ends(places.segments_BL), ends(places.positions_BL))


def may_see(queries: Bounds, keys: Bounds, window: int) -> jax.Array:
    """False only where no query of a run sees any key of the other; broadcasts."""
    (q_first, q_last), (k_first, k_last) = queries.segments, keys.segments
    may = (q_first <= k_last) & (k_first <= q_last)
    (q_first, q_last), (k_first, k_last) = queries.positions, keys.positions
    may &= q_last >= k_first
    return may & (q_first - k_last < window) if window else may

"""Which key each query sees in packed rows. Letters: B batch, L query length, M key length."""

import jax

MASKED = -1e30  # finite: a row without any visible key then stays free of NaN


def visible(segments_BL, positions_BL, window: int) -> jax.Array:
    """Whether a query sees a key, [B, L, M] bool: same document, not later, within the window."""
    same_BLM = segments_BL[:, :, None] == segments_BL[:, None, :]
    distance_BLM = positions_BL[:, :, None] - positions_BL[:, None, :]
    seen_BLM = same_BLM & (distance_BLM >= 0)
    return seen_BLM & (distance_BLM < window) if window else seen_BLM

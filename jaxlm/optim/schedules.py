"""Learning rates over a run of known length.

Every schedule rises linearly over `warmup_steps` (the first step already moves: it has 1/warmup of
the peak, not 0), and then
  constant  stays at the peak
  cosine    falls over all that is left, by half a cosine
  linear    stays, then falls on a straight line over the last `decay_fraction` of the run
  wsd       stays, then falls as 1 - sqrt(progress) over the last `decay_fraction` of the run
            (warm-up, stable, decay; the shape is that of https://arxiv.org/abs/2405.18392)
towards `final_fraction` of the peak. The end of the fall is where the step after the last would
be, so that with a final fraction of 0 the last step still counts.
"""

import difflib
from collections.abc import Callable

import jax
import jax.numpy as jnp

FALLS = {
    "constant": lambda progress: jnp.zeros_like(progress),
    "cosine": lambda progress: 0.5 - 0.5 * jnp.cos(jnp.pi * progress),
    "linear": lambda progress: progress,
    "wsd": jnp.sqrt,
}


def make_schedule(
    kind: str,
    *,
    peak: float,
    steps: int,
    warmup_steps: int = 0,
    decay_fraction: float = 0.5,
    final_fraction: float = 0.0,
) -> Callable[[jax.Array | int], jax.Array]:
    """`schedule(step) -> rate` [] float32, where `step` counts the steps taken before, from 0."""
    _check(kind, peak, steps, warmup_steps, decay_fraction, final_fraction)
    stays = {"linear", "wsd"} & {kind}
    start = max(warmup_steps, steps - round(decay_fraction * steps)) if stays else warmup_steps

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        rise = jnp.minimum(1.0, (step + 1) / max(warmup_steps, 1))
        progress = jnp.clip((step - start) / max(steps - start, 1), 0.0, 1.0)
        return peak * rise * (1 - (1 - final_fraction) * FALLS[kind](progress))

    return schedule


def _check(kind, peak, steps, warmup_steps, decay_fraction, final_fraction):
    """Raises `ValueError` with the config key and the remedy."""
    if kind not in FALLS:
        near = difflib.get_close_matches(kind, FALLS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(FALLS)}."
        raise ValueError(f"optimizer.schedule {kind!r} is not known; {hint}")
    if steps < 1:
        raise ValueError(f"a learning-rate schedule needs at least one step, not {steps}.")
    if not peak > 0:
        raise ValueError(f"optimizer.learning_rate must be positive, and is {peak}.")
    if not 0 <= warmup_steps <= steps:
        raise ValueError(
            f"optimizer.warmup_steps is {warmup_steps} in a run of {steps} steps; give a number "
            "from 0 to the number of steps (--config.optimizer.warmup_steps)."
        )
    if not 0 < decay_fraction <= 1:
        raise ValueError(
            f"optimizer.decay_fraction is {decay_fraction}; it is the share of the run over which "
            "the rate falls, above 0 and at most 1."
        )
    if not 0 <= final_fraction <= 1:
        raise ValueError(
            f"optimizer.final_fraction is {final_fraction}; it is the last rate divided by the "
            "peak, from 0 to 1."
        )

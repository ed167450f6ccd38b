"""An exponential moving average of the params, scored in evaluation next to them.

    average <- d · average + (1 - d) · params,   d = min(decay, (1 + t) / (10 + t)) after t steps

The ramp of d, TensorFlow's, keeps the random start out of short runs. Kept in float32. With
`every` > 1 the average is updated less often, with d to that power: cheaper, nearly the same.
"""

import jax
import jax.numpy as jnp

from jaxlm.contract import Between, Extra, Method


def ema(*, decay: float = 0.999, every: int = 1) -> Method:
    """`decay`: per optimizer step; the average reaches back about 1 / (1 - decay) steps."""
    if not 0 <= decay < 1:
        raise ValueError(f"decay is {decay}; give a number from 0 to below 1")
    if every < 1:
        raise ValueError(f"every is {every}; give the steps between two updates, at least 1")

    def fn(params, extras):
        steps = extras["ema_steps"] + every
        keep = jnp.minimum(decay, (1.0 + steps) / (10.0 + steps)) ** every
        mix = lambda average, param: keep * average + (1 - keep) * param.astype(jnp.float32)
        return {"ema": jax.tree.map(mix, extras["ema"], params), "ema_steps": steps}

    copy = lambda params, load: jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params)
    extras = {
        "ema": Extra(copy, evaluate=True),
        "ema_steps": Extra(lambda params, load: jnp.zeros((), jnp.int32), axes=()),
    }
    return Method(extras=extras, between=(Between(every, ("ema", "ema_steps"), fn),))

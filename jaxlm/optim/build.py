"""From a spec to an optimizer: clip, core, then decay and rate per parameter.

    update = -rate(step) · multiple · (core(clipped gradient) + weight_decay · parameter)

The core is Adam, Muon with Adam for what is no matrix of a block, or any other optimizer of optax
by name (`jaxlm.optim.named`). The leading "layers" axis of stacked parameters is a batch axis for
each of them, so that a run does not depend on `scan_layers`. Moments and Newton–Schulz are in
float32 whatever the parameters are in.

Muon's updates (`jaxlm.optim.muon`) have singular values near 1. They are scaled by
0.2·sqrt(max(in, out)) as in Moonlight (https://arxiv.org/abs/2502.16982), so that the root mean
square of every update is about AdamW's 0.2: one learning rate and one weight decay serve both, and
AdamW's carry over. To come from recipes that scale by sqrt(max(1, out/in)): a rate r there on a
square kernel of width d is r / (0.2·sqrt(d)) here (0.02 at width 128 becomes 0.009).
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxlm.optim import named, rules, schedules
from jaxlm.optim.muon import scale_by_muon
from jaxlm.optim.offload import in_turn
from jaxlm.optim.rounding import second_moments_in_bfloat16
from jaxlm.sharding import EXPERTS

MUON_RMS = 0.2  # of an AdamW update, as measured by Moonlight's authors
OWN = -1.0  # in a field of the spec: what the optimizer takes by itself
USUAL = {"weight_decay": 0.1, "b1": 0.9, "b2": 0.95, "eps": 1e-8, "momentum": 0.95}


@dataclasses.dataclass(frozen=True)
class OptimizerSpec:
    """The knobs of `config.optimizer`.

    Fields of -1 are the optimizer's own: for adamw and muon those of `USUAL` (`settled`), for
    others what optax gives them; other values are handed over, and refused if it does not take
    them.
    """

    name: str = "adamw"
    learning_rate: float = 1e-3
    adam_learning_rate: float = 0.0  # muon: peak for what Muon does not take; 0 = learning_rate
    schedule: str = "cosine"
    warmup_steps: int = 0
    decay_fraction: float = 0.5
    final_fraction: float = 0.0
    weight_decay: float = OWN
    b1: float = OWN
    b2: float = OWN
    eps: float = OWN
    momentum: float = OWN  # of Muon, and of others by that name
    clip: float = 1.0  # global norm of the gradient; 0 = off
    rules: str = ""  # see jaxlm.optim.rules
    moment_dtype: str = ""  # of the first moment; "" = float32
    second_moment_dtype: str = ""  # "" = float32; bfloat16 is rounded at random (`rounding`)
    gradient_dtype: str = ""  # of the sums over micro-batches; "" = float32
    offload: bool = False  # the moments lie in the host's memory but while they are updated


def settled(spec: OptimizerSpec) -> OptimizerSpec:
    """The spec with what adamw and muon take where it leaves that open."""
    if spec.name not in ("adamw", "muon"):
        return spec
    still_open = {key: value for key, value in USUAL.items() if getattr(spec, key) == OWN}
    return dataclasses.replace(spec, **still_open)


def build(spec: OptimizerSpec, steps: int, axes: Any):
    """The optimizer, and its schedule step -> rate, for params with these logical axes.

    Raises `ValueError` in words for anything that cannot be built. The optimizer swallows the
    step's `taps` and `extras`.
    """
    spec = settled(spec)
    _check(spec)
    schedule = schedules.make_schedule(
        spec.schedule,
        peak=spec.learning_rate,
        steps=steps,
        warmup_steps=spec.warmup_steps,
        decay_fraction=spec.decay_fraction,
        final_fraction=spec.final_fraction,
    )
    multiples, decays = rules.per_parameter(spec.rules, axes, spec.weight_decay)
    if spec.name == "adamw":
        core = optax.chain(_adam(spec), decay_and_rate(schedule, multiples, decays))
    elif spec.name == "muon":
        multiples = _adam_multiples(spec, multiples, axes)
        core = optax.chain(_muon(spec, axes), decay_and_rate(schedule, multiples, decays))
    else:
        core = named.build(spec, OptimizerSpec(), schedule, axes, multiples, decays)
    if spec.second_moment_dtype == "bfloat16":
        core = second_moments_in_bfloat16(core, spec.name)
    core = in_float32(core)
    parts = [clip(spec.clip)] if spec.clip else []
    parts += [in_turn(core, axes) if spec.offload else core]
    return optax.with_extra_args_support(optax.chain(*parts)), schedule


def is_matrix(names: tuple) -> bool:
    """Whether Muon takes a parameter with these logical axes: a matrix, one a layer if stacked and
    one an expert if there are such, that is neither embedding (of tokens or positions) nor head."""
    for batch in ("layers", *EXPERTS):
        names = names[1:] if names[:1] == (batch,) else names
    return len(names) == 2 and not {"vocabulary", "positions"} & set(names)


def clip(limit: float) -> optax.GradientTransformation:
    """Scales the gradient down to a global norm of at most `limit`."""

    def update(updates, state, params=None):
        del params
        scale = jnp.minimum(1.0, limit / optax.tree.norm(updates))
        return jax.tree.map(lambda u: u * scale.astype(u.dtype), updates), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def decay_and_rate(schedule, multiples: Any, decays: Any) -> optax.GradientTransformation:
    """u -> -schedule(step) · multiple · (u + decay · p), each parameter by its own numbers."""

    def init(params):
        del params
        return optax.ScaleByScheduleState(count=jnp.zeros([], jnp.int32))

    def update(updates, state, params=None):
        rate = schedule(state.count)

        def one(update, param, multiple, decay):
            return (-multiple * rate) * (update + decay * param if decay else update)

        updates = jax.tree.map(one, updates, params, multiples, decays)
        return updates, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)


def in_float32(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Shows `tx` gradients and params in float32, and so keeps its state and updates in it."""
    tx = optax.with_extra_args_support(tx)

    def update(updates, state, params=None, **extra):
        return tx.update(_float32(updates), state, _float32(params), **extra)

    return optax.GradientTransformationExtraArgs(lambda params: tx.init(_float32(params)), update)


def _float32(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def _adam(spec):
    return optax.scale_by_adam(spec.b1, spec.b2, spec.eps, mu_dtype=spec.moment_dtype or None)


def _muon(spec, axes):
    """Muon for matrices, Adam for all else."""
    of_axes = lambda fn: jax.tree.map(fn, axes, is_leaf=rules.is_names)
    labels = of_axes(lambda names: "muon" if is_matrix(names) else "adam")
    if "muon" not in jax.tree.leaves(labels):
        raise ValueError("optimizer muon finds no matrix to update in this model; use adamw.")
    behind = lambda names: names[1:] if names[:1] == ("layers",) else names
    layouts = of_axes(lambda names: behind(names) if is_matrix(names) else optax.MaskedNode())
    muon = scale_by_muon(spec.momentum, spec.eps, layouts, spec.moment_dtype or None)
    return optax.partition(
        {"muon": optax.chain(muon, _consistent_rms()), "adam": _adam(spec)}, labels
    )


def _consistent_rms():
    def scale(x):
        return MUON_RMS * math.sqrt(max(x.shape[-2:])) * x

    return optax.stateless(lambda updates, _: jax.tree.map(scale, updates))


def _adam_multiples(spec, multiples, axes):
    """Muon's rate multiples, with those of Adam's parameters relative to `learning_rate`."""
    ratio = (spec.adam_learning_rate or spec.learning_rate) / spec.learning_rate
    return jax.tree.map(
        lambda names, multiple: multiple if is_matrix(names) else multiple * ratio,
        axes,
        multiples,
        is_leaf=rules.is_names,
    )


def _check(spec):
    """Raises `ValueError` for an unknown name and for numbers out of range."""
    named.require_known(spec.name)
    if spec.offload and spec.name not in {"adamw", "muon", *named.ELEMENTWISE}:
        raise ValueError(
            f"optimizer.offload={spec.offload} updates a part of the params at a time, which "
            f"{spec.name} cannot, as its numbers depend on each other; leave it out, or take adamw "
            "or muon"
        )
    for key in ("b1", "b2", "momentum"):
        if not (0 <= getattr(spec, key) < 1 or getattr(spec, key) == OWN):
            raise ValueError(
                f"optimizer.{key} is {getattr(spec, key)}; give one from 0 to below 1."
            )
    if not (spec.eps > 0 or spec.eps == OWN):
        raise ValueError(
            f"optimizer.eps is {spec.eps}; give one above 0, such as 1e-8, since a gradient of 0 "
            "would be divided by 0."
        )
    if not (spec.weight_decay >= 0 or spec.weight_decay == OWN):
        raise ValueError(f"optimizer.weight_decay is {spec.weight_decay}; it may not be negative.")
    for key in ("clip", "adam_learning_rate"):
        if not getattr(spec, key) >= 0:
            raise ValueError(f"optimizer.{key} is {getattr(spec, key)}; it may not be negative.")
    if spec.adam_learning_rate and spec.name != "muon":
        raise ValueError(
            f"optimizer.adam_learning_rate is only read by muon, not by {spec.name}; set "
            "--config.optimizer.adam_learning_rate=0, and optimizer.learning_rate or a rule of "
            "optimizer.rules."
        )
    for key in ("moment_dtype", "second_moment_dtype", "gradient_dtype"):
        if getattr(spec, key) not in ("", "float32", "bfloat16"):
            raise ValueError(
                f"optimizer.{key} is {getattr(spec, key)!r}; give 'float32' or 'bfloat16', or "
                "leave it empty."
            )

"""One training step for every method: select -> sum gradients over micro-batches -> update.

Losses, metrics, taps and gradients are sums; they are divided once, by the summed weight, so that
accumulation, packing, padding and sharding cannot change the result. One penalty is no such sum:
the balance of a mixture of experts, a product of means that is taken within each micro-batch, so
that accumulation does change it (`jaxlm.models.experts`).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxlm.contract import BASE, LM, Method, TrainState, bound

GUARD_MEMORY = 0.98  # of the running mean and variance of the loss that the spike guard reads
GUARD_WARMUP = 100  # steps it watches before it judges


def init_guard():
    """What the guards remember: updates skipped in all and in a row, and the loss so far."""
    kinds = {"skipped": "int32", "in_row": "int32", "seen": "int32"}
    kinds |= {"mean": "float32", "variance": "float32"}
    return {name: jnp.zeros((), kind) for name, kind in kinds.items()}  # one buffer each: donated


def init_state(params, method: Method, tx, load: Any = None, base: Any = None) -> TrainState:
    """The state at the start of a run. Traceable where no extra calls `load`.

    `params`: those that are trained; `base`: the model's, where an adapter's are trained instead.
    """
    of = lambda name: base if name == BASE else params
    extras = {name: extra.init(of(name), load) for name, extra in method.extras.items()}
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), extras, init_guard())


def make_step(
    lm: LM,
    method: Method,
    tx,
    *,
    accumulate: int = 1,
    sums: str = "float32",
    spike_sigmas: float = 0.0,
    shardings=None,
):
    """Returns the jitted `step(state, batch, key) -> state, metrics`; the state is donated.

    An update whose loss or gradient is not finite is skipped: params and moments stay, while the
    step and every count advance. With `spike_sigmas` > 0 so is one whose loss lies that many
    standard deviations above its running mean. Where only the update has numbers that are not
    finite, these are left out, and it counts as skipped. `sums`: the dtype in which gradients are
    summed over micro-batches. `shardings`: those of the state, or None.
    Raises `ValueError` where the method cannot be trained so.
    """
    objective = method.objective
    if objective is None:
        raise ValueError("the method has no objective: add one, such as next_token or dpo")
    if accumulate > 1 and not method.separable:
        raise ValueError("this objective is no sum over rows, so --config.accumulate must be 1")

    def step(state, batch, key):
        here = bound(lm, method, state.extras)
        select_key, loss_key = jax.random.split(jax.random.fold_in(key, state.step))
        metrics = {}
        if method.select:
            with jax.named_scope("select"):
                batch, metrics = method.select(here, state.params, state.extras, batch, select_key)
            audit = {"selected/source": batch["source"], "selected/index": batch["index"]}
            metrics = metrics | audit

        def micro_grads(micro_batch, micro_key):
            loss_fn = lambda p: objective(here, p, state.extras, micro_batch, micro_key)
            (loss, aux), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
            return loss, aux, grads

        loss, aux, grads = _sum_over_micro_batches(micro_grads, batch, loss_key, accumulate, sums)
        mean = lambda tree: jax.tree.map(lambda x: x / aux.weight, tree)
        loss, grads = mean((loss, grads))
        with jax.named_scope("optimizer"):
            norm_grads = optax.tree.norm(grads)
            good = _is_good(state.guard, loss, norm_grads, spike_sigmas)
            keep = functools.partial(_unless, good)
            updates, opt_state = tx.update(
                grads, state.opt_state, state.params, taps=aux.taps, extras=state.extras, keep=keep
            )
            params = optax.apply_updates(state.params, updates)
        params, opt_state = keep((params, opt_state), (state.params, state.opt_state))
        norm_updates = optax.tree.norm(updates)
        guard = _remembered(state.guard, loss, good & jnp.isfinite(norm_updates))
        metrics |= {name: per(each, aux.weight) for name, each in aux.metrics.items()}
        metrics |= {
            "loss": loss,
            "weight": aux.weight,
            "norm/grads": norm_grads,
            "norm/updates": norm_updates,
            "skipped": guard["skipped"],
            "skipped_in_row": guard["in_row"],
        }
        return TrainState(state.step + 1, params, opt_state, state.extras, guard), metrics

    # The metrics whole on every device: each process reads them from its own.
    out = None if shardings is None else (shardings, shardings.step)
    return jax.jit(step, donate_argnums=0, out_shardings=out)


def weighed(metric, weight):
    """(sum, weight) of a metric, which may come with a weight of its own."""
    return metric if isinstance(metric, tuple) else (metric, weight)


def per(metric, weight):
    """The mean of a metric; NaN where nothing of its kind was there."""
    total, weight = weighed(metric, weight)
    return total / weight


def make_score(lm: LM, method: Method, *, whole=None):
    """Returns the jitted `score(params, extras, batch) -> {name: (sum, weight)}`, for evaluation:
    the objective's loss and metrics, without dropout. `whole`: the sharding of its results."""
    objective = method.objective
    assert objective

    def score(params, extras, batch):
        loss, aux = objective(bound(lm, method, extras), params, extras, batch, None)
        found = {name: weighed(each, aux.weight) for name, each in aux.metrics.items()}
        return {"loss": (loss, aux.weight)} | found

    return jax.jit(score, out_shardings=whole)


def _sum_over_micro_batches(fn, batch, key, accumulate, sums):
    """Sums of loss, weight, metrics, taps and grads, so uneven micro-batches weigh rightly.

    In float32 but for those of gradients, whose dtype is `sums`: each addition is made in float32,
    and rounded.
    """
    if accumulate == 1:
        return fn(batch, key)
    # Every accumulate-th row, not a run of rows: rows of one device stay on it.
    split = jax.tree.map(
        lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), dict(batch)
    )
    xs = (split, jax.random.split(key, accumulate))
    shapes = jax.eval_shape(fn, *jax.tree.map(lambda x: x[0], xs))

    def zeros(tree, floating):
        kind = lambda s: floating if jnp.issubdtype(s.dtype, jnp.floating) else s.dtype
        return jax.tree.map(lambda s: jnp.zeros(s.shape, kind(s)), tree)

    add = lambda total, new: jnp.add(total, new).astype(total.dtype)
    start = (*zeros(shapes[:2], jnp.float32), zeros(shapes[2], sums))
    return jax.lax.scan(lambda total, x: (jax.tree.map(add, total, fn(*x)), None), start, xs)[0]


def _is_good(guard, loss, norm_grads, spike_sigmas):
    """Whether to take what is finite of the update."""
    finite = jnp.isfinite(loss) & jnp.isfinite(norm_grads)
    limit = guard["mean"] + spike_sigmas * jnp.sqrt(guard["variance"])
    spike = (spike_sigmas > 0) & (guard["seen"] >= GUARD_WARMUP) & (loss > limit)
    return finite & ~spike


def _remembered(guard, loss, whole):
    """What the guards remember of an update that was taken whole, or was not."""
    memory = jnp.where(guard["seen"] == 0, 0.0, GUARD_MEMORY)
    mean = memory * guard["mean"] + (1 - memory) * loss
    off = (loss - guard["mean"]) * (loss - mean)  # one-pass variance; first loss gives loss * 0
    judged = {
        "skipped": guard["skipped"],
        "in_row": jnp.zeros_like(guard["in_row"]),
        "seen": guard["seen"] + 1,
        "mean": mean,
        "variance": memory * guard["variance"] + (1 - memory) * off,
    }
    skipped = guard | {"skipped": guard["skipped"] + 1, "in_row": guard["in_row"] + 1}
    return {name: jnp.where(whole, judged[name], skipped[name]) for name in guard}


def _unless(good, new, old):
    """`new` if good, else `old`; integers (the counts that schedules read) are always new.

    Each number that is not finite stays as it was: to keep all for the sake of one, the update
    would have to be whole before the first number is written, which takes memory like the params.
    What lies in the host's memory was kept part by part (`optim.offload`).
    """

    def keep(n, o):
        there = jax.typeof(n).memory_space == jax.memory.Space.Host
        if there or jnp.issubdtype(n.dtype, jnp.integer):
            return n
        floating = jnp.issubdtype(n.dtype, jnp.floating)
        return jnp.where(good & jnp.isfinite(n) if floating else good, n, o)

    return jax.tree.map(keep, new, old)


def make_between(method: Method, *, shardings=None):
    """Returns `between(step, state) -> state`, to call after each step with the steps taken.

    `shardings`: those of the state, or None.
    """

    def compile_one(b):
        def fn(written, rest, params):
            return b.fn(params, {**rest, **written})

        out = shardings and {name: shardings.extras[name] for name in b.writes}
        return b, jax.jit(fn, donate_argnums=0, out_shardings=out)

    compiled = [compile_one(b) for b in method.between]

    def between(step: int, state: TrainState) -> TrainState:
        for b, fn in compiled:
            if step % b.every == 0:
                written = {name: state.extras[name] for name in b.writes}
                rest = {k: v for k, v in state.extras.items() if k not in written}
                state = state._replace(extras={**rest, **fn(written, rest, state.params)})
        return state

    return between


def written_extras(method: Method) -> set[str]:
    """Extras that change during a run, and so belong to every checkpoint.

    The others belong to the start of the run: they are saved once, and never made anew from
    restored params, which would silently move a frozen reference.
    """
    return {name for b in method.between for name in b.writes}

"""The state of a run as shapes that know where they lie, without an array."""

import dataclasses

import jax

from jaxlm import sharding
from jaxlm.contract import BASE, LM, TrainState, bound
from jaxlm.optim.state import state_axes, state_shardings
from jaxlm.specs import Run
from jaxlm.step import init_state


def abstract_state(run: Run, mesh, lm: LM, tx) -> TrainState:
    """Shapes and shardings of the state, without making it."""
    ours = {name: e for name, e in run.method.extras.items() if not e.model}
    method = dataclasses.replace(run.method, extras=ours)
    key = jax.random.key(0)
    base = jax.eval_shape(lm.init, key)
    trained = bound(lm, method, {BASE: base})
    start = lambda base: init_state(trained.init(key), method, tx, lambda path: base, base)
    shapes = jax.eval_shape(start, base)
    whole = sharding.replicated(mesh)
    opt_state = state_shardings(tx, shapes.params, trained.axes, mesh)
    if run.optimizer.offload:
        opt_state = _offloaded(run, mesh, state_axes(tx, shapes.params, trained.axes), opt_state)
    like_base = lambda tree: jax.tree.structure(tree) == jax.tree.structure(base)

    def of_extra(name, axes):
        if axes is None:
            of_model = name == BASE or like_base(shapes.extras[name])
            axes = lm.axes if of_model else trained.axes
        return sharding.param_shardings(axes, shapes.extras[name], mesh)

    extras = {name: of_extra(name, extra.axes) for name, extra in ours.items()}
    rest = jax.tree.map(lambda _: whole, shapes)
    params = sharding.param_shardings(trained.axes, shapes.params, mesh)
    layout = rest._replace(params=params, opt_state=opt_state, extras=extras)
    place = lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where)
    state = jax.tree.map(place, shapes, layout)
    models = {
        name: sharding.abstract_params(lm.others[name], mesh)
        for name in run.method.extras.keys() - ours.keys()
    }
    return state._replace(extras={**state.extras, **models})


def _offloaded(run, mesh, axes, layout):
    """The optimizer's state in the hosts' memory. Raises `ValueError` where that cannot be."""
    key = f"config.optimizer.offload={run.optimizer.offload}"
    if not sharding.has_host_memory(mesh):
        device = mesh.devices.flat[0].device_kind
        raise ValueError(
            f"{key}: JAX knows of no {sharding.HOST!r} memory next to a {device}; leave it out"
        )
    found = sharding.in_host_memory(axes, layout)
    if not any(where.memory_kind == sharding.HOST for where in jax.tree.leaves(found)):
        raise ValueError(
            f"{key}: {run.optimizer.name} keeps no moments of matrices here; leave it out"
        )
    return found

"""Moments that lie in the hosts' memory, and are brought to the devices a part at a time.

A device reads and writes some memory of its host by itself (`pinned_host`), and an optimizer's
state is needed once in a step, so it may lie there. All of it at hand at once would take back what
that saves (a compiler fetches early), so stacked layers have their turn one after the other in a
loop, and then all other params together.

For optimizers that update each number by its own history, and for Muon, which does so with each
matrix. The numbers are those of one update of all, but for the last digit of stacked params where a
compiler would round product and sum once (a CPU's and a GPU's do): here a loop lies between them.
Params whose turn it is not are shown to the optimizer as arrays of size 0.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxlm.optim.rules import is_names
from jaxlm.optim.state import owners

DEVICE, HOST = jax.memory.Space.Device, jax.memory.Space.Host


def in_turn(tx: optax.GradientTransformation, axes: Any):
    """`tx`, which is shown a part of the params at a time; its state may lie on the hosts.

    Updates take the place of the gradients, in float32. `keep`, a keyword of the update: (new, old)
    state of a part -> what becomes of it. Nobody looks again at what lies on the hosts (`step`), so
    state there without it, where a wrap of the optimizer drops keywords, is a `ValueError`.
    """

    def update(updates, state, params=None, *, keep=None, **unread):
        del unread
        weights, structure = jax.tree.flatten(params)
        of = owners(tx, params)
        first, state_structure = jax.tree.flatten(state)
        if keep is None and any(jax.typeof(x).memory_space == HOST for x in first):
            raise ValueError(
                "config.optimizer.offload=True: by the keyword `keep` moments on the host stay as "
                "they were after a bad update, and the method's wrap of the optimizer drops it; "
                "make that an optax.GradientTransformationExtraArgs whose update hands all "
                "keywords on, or leave offload out"
            )

        def turn(cut, grads, held):
            """Updates and new state of what `cut` takes out of (index of a param, array)."""
            grads, params = (
                structure.unflatten([cut(i, x) for i, x in enumerate(tree)])
                for tree in (grads, weights)
            )
            # Counts are those of the start, whose turn ever it is.
            parts = [
                old if i is None else cut(i, x) for i, x, old in zip(of, held, first, strict=True)
            ]
            old = state_structure.unflatten([_put(x, DEVICE) for x in parts])
            done, new = tx.update(grads, old, params)
            return jax.tree.leaves(done), jax.tree.leaves(keep(new, old) if keep else new)

        grads, held = [g.astype(jnp.float32) for g in jax.tree.leaves(updates)], first
        for layers, mine in _turns(axes, weights):
            if layers:
                grads, held = _one_by_one(turn, layers, mine, of, grads, held)
            else:
                grads, held = _together(turn, mine, of, grads, held)
        return structure.unflatten(grads), state_structure.unflatten(held)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def _turns(axes, weights):
    """(number of layers or 0, numbers of the params) of each turn."""
    names = jax.tree.leaves(axes, is_leaf=is_names)
    layers = [
        w.shape[0] if n[:1] == ("layers",) else 0 for n, w in zip(names, weights, strict=True)
    ]
    for count in sorted(set(layers) - {0}, reverse=True):
        yield count, {i for i, n in enumerate(layers) if n == count}
    yield 0, {i for i, n in enumerate(layers) if not n}


def _one_by_one(turn, layers, mine, of, grads, held):
    """A turn for each of the layers that some params are stacks of."""

    def one(layer, carried):
        grads, held = carried
        slice = lambda x: jax.lax.dynamic_slice_in_dim(x, layer, 1)
        done, new = turn(lambda i, x: slice(x) if i in mine else _none(x), grads, held)

        def write(i, whole, part):
            if i is None:
                return part
            if i not in mine:
                return whole
            return jax.lax.dynamic_update_slice_in_dim(whole, _like(part, whole), layer, 0)

        return _each(write, range(len(grads)), grads, done), _each(write, of, held, new)

    return jax.lax.fori_loop(0, layers, one, (grads, held))


def _together(turn, mine, of, grads, held):
    done, new = turn(lambda i, x: x if i in mine else _none(x), grads, held)
    write = lambda i, whole, part: part if i is None or i in mine else whole
    put = lambda i, whole, part: _like(write(i, whole, part), whole)
    return _each(write, range(len(grads)), grads, done), _each(put, of, held, new)


def _each(fn, of, wholes, parts):
    return [fn(*each) for each in zip(of, wholes, parts, strict=True)]


def _none(x):
    return jnp.zeros((0, *x.shape[1:]), x.dtype)


def _like(x, other):
    """x in that memory in which the other one lies."""
    return _put(x, jax.typeof(other).memory_space)


def _put(x, space):
    return x if jax.typeof(x).memory_space == space else jax.device_put(x, space)

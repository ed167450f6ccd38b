"""Where an optimizer's state lies on the mesh.

Moments have the shape of their parameter and lie as it does. All else (counts, factored second
moments, per-layer scalars) is small and stays whole.
"""

from typing import Any

import jax

from jaxlm.optim.rules import is_names
from jaxlm.sharding import param_shardings


def state_axes(tx, params: Any, axes: Any) -> list[tuple]:
    """Logical axes of each leaf of `tx`'s state, in the order of `jax.tree.leaves`.

    A list, since a state's own tuples could not be told from tuples of names. `params` may be
    shapes. A leaf belongs to the parameter whose whole path its own path ends in.
    """
    shapes = [leaf.shape for leaf in jax.tree.leaves(params)]
    named = jax.tree_util.tree_leaves_with_path(axes, is_leaf=is_names)
    known = {path: (shape, names) for shape, (path, names) in zip(shapes, named, strict=True)}
    state = jax.eval_shape(tx.init, params)
    return [
        _names_of(path, leaf.shape, known)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    ]


def state_shardings(tx, params: Any, axes: Any, mesh) -> Any:
    """A tree like `tx.init(params)` of shardings, for `out_shardings` and for restoring."""
    leaves, treedef = jax.tree.flatten(jax.eval_shape(tx.init, params))
    return treedef.unflatten(param_shardings(state_axes(tx, params, axes), leaves, mesh))


def owners(tx, params: Any) -> list[int | None]:
    """Of each leaf of `tx`'s state the number of the param that it belongs to and is shaped like;
    None for what belongs to all."""
    shaped = jax.tree_util.tree_leaves_with_path(params)
    known = {path: (i, leaf.shape) for i, (path, leaf) in enumerate(shaped)}
    state = jax.eval_shape(tx.init, params)

    def owner(path, shape):
        for start in range(len(path)):
            i, of = known.get(path[start:], (None, None))
            if of == shape:
                return i
        return None

    return [owner(path, x.shape) for path, x in jax.tree_util.tree_leaves_with_path(state)]


def _names_of(path, shape, known):
    for start in range(len(path)):  # the longest end of the path first
        for end in (len(path), len(path) - 1):  # the last key may be the number of a layer
            param_shape, names = known.get(path[start:end], (None, ()))
            if param_shape == shape and end == len(path):
                return names
            if names[:1] == ("layers",) and param_shape[1:] == shape and end < len(path):
                return names[1:]
    return (None,) * len(shape)

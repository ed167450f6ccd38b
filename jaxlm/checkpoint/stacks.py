"""Trees of arrays whose layers are stacked or not, and the way from the one form to the other.

A stack is an array under `blocks` with a leading layer axis (`models.transformer`). The path of one
layer's array, stacked or not, is written "blocks/<layer>/...", behind "0/mu/" and the like in what
holds trees of the form of the params (moments, averages). Where an optimizer is shown one parameter
per layer (`optim.named.per_layer`), what it keeps of a stack is called "blocks/.../<layer>".
"""

import collections
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxlm.checkpoint.digest import Layout

Shapes = Mapping[str, jax.ShapeDtypeStruct]

BLOCKS = "blocks"
AT_ONCE = 2**29  # bytes read from a checkpoint at one time, where its form is another


class Place(NamedTuple):
    """The array that holds one layer's, and where in its stack; None where layers are apart."""

    name: str
    layer: int | None


def places(shapes: Shapes) -> dict[str, Place]:
    """Path of each array of one layer -> where it is."""
    return {
        path: Place(name, layer)
        for name, leaf in shapes.items()
        for path, layer in _paths(name, leaf.shape)
    }


def _paths(name: str, shape: tuple[int, ...]) -> list[tuple[str, int | None]]:
    """Of each layer that an array holds: its path, and where it is in the stack."""
    before, inside, behind = f"/{name}".partition(f"/{BLOCKS}/")
    parts = behind.split("/")
    number = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    if not inside or (number is None and not shape):
        return [(name, None)]
    path = lambda i, rest: "/".join([f"{before}/{BLOCKS}"[1:], str(i), *rest])
    if number is not None:
        return [(path(parts[number], [*parts[:number], *parts[number + 1 :]]), None)]
    return [(path(i, parts), i) for i in range(shape[0])]


def of_layers(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Path of each array of one layer -> its shape."""
    cut = lambda shape, layer: shape if layer is None else shape[1:]
    return {path: cut(shapes[name].shape, i) for path, (name, i) in places(shapes).items()}


def by_layer(layout: Layout) -> Layout:
    """The layout that a tree has whose layers are apart."""
    shapes = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, (shape, _) in layout.items()}
    where = places(shapes)
    return {path: (shape, layout[where[path].name][1]) for path, shape in of_layers(shapes).items()}


def shapes_like(layout: Layout, wanted: Shapes) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the arrays of a layout, with the dtypes of the same layers in `wanted`."""
    where = places(wanted)
    like = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, (shape, _) in layout.items()}
    dtypes = {name: wanted[where[path].name].dtype for path, (name, _) in places(like).items()}
    return {name: jax.ShapeDtypeStruct(x.shape, dtypes[name]) for name, x in like.items()}


def rearranged(
    read: Callable[[Shapes], Mapping[str, jax.Array]], there: Shapes, wanted: Shapes
) -> dict[str, jax.Array]:
    """The arrays of `wanted` by name, made of those of a checkpoint that has their layers.

    `read`: some arrays by their names there, laid out as it is told.
    """
    return assembled(wanted, layers(read, there, wanted))


def layers(
    read: Callable[[Shapes], Mapping[str, jax.Array]], there: Shapes, wanted: Shapes
) -> Iterator[tuple[str, jax.Array]]:
    """Yields (path, array of one layer) of all that is wanted of a checkpoint, some arrays read at
    a time, lying as `wanted` says of the same path."""
    needed = places(wanted)
    held = {path: place for path, place in places(there).items() if path in needed}
    for names in _batches(there, held, needed):
        paths = [path for path in held if held[path].name in names]
        structs = {}
        for path in paths:
            saved, leaf = there[held[path].name], wanted[needed[path].name]
            layout = layout_of(leaf, saved.ndim)
            structs[held[path].name] = jax.ShapeDtypeStruct(
                saved.shape, saved.dtype, sharding=layout
            )
        arrays = read(structs)
        for path in paths:
            name, layer = held[path]
            yield path, arrays[name] if layer is None else arrays[name][layer]


def _batches(there: Shapes, held, needed) -> Iterator[set[str]]:
    """Names of saved arrays to read at one time; all that make up one stack are near each other."""
    ordered = dict.fromkeys(held[p].name for p in sorted(held, key=lambda path: needed[path].name))
    batch, size = set(), 0
    for name in ordered:
        batch.add(name)
        size += there[name].size * there[name].dtype.itemsize
        if size >= AT_ONCE:
            yield batch
            batch, size = set(), 0
    if batch:
        yield batch


def assembled(wanted: Shapes, arrays: Iterable[tuple[str, jax.Array]]) -> dict[str, jax.Array]:
    """The arrays of `wanted` by name, of arrays that come by path, one layer's at a time.

    Stacks are written in place, so that next to the tree there is one array more at most; those
    that are to lie on the hosts move there when they are whole.
    """
    where = places(wanted)
    lacking = collections.Counter(place.name for place in where.values())
    missing = set(where)
    done: dict[str, jax.Array] = {}
    for path, array in arrays:
        missing.discard(path)
        name, layer = where[path]
        leaf, layout = wanted[name], layout_of(wanted[name])
        lacking[name] -= 1
        if layer is None:
            fits = array.dtype == leaf.dtype and array.sharding == layout
            done[name] = array if fits else _cast(leaf.dtype, layout)(array)
        else:
            here = _in_device_memory(layout)
            stack = done.pop(name) if name in done else _zeros(leaf.shape, leaf.dtype, here)
            done[name] = _filled(here)(stack, array, layer)
            if not lacking[name] and here != layout:
                done[name] = jax.device_put(done[name], layout)
        jax.block_until_ready(done[name])
    if missing:
        raise ValueError(f"{len(missing)} arrays of the model are lacking, as {min(missing)}")
    return done


def layout_of(leaf: jax.ShapeDtypeStruct, ndim: int = -1) -> jax.sharding.Sharding:
    """The sharding of an array; with `ndim` that of one layer of it, or of a stack of such."""
    layout = leaf.sharding or SingleDeviceSharding(jax.local_devices()[0])
    if ndim in (-1, leaf.ndim) or not isinstance(layout, NamedSharding):
        return layout
    spec = layout.spec[1:] if ndim < leaf.ndim else (None, *layout.spec)
    return NamedSharding(layout.mesh, PartitionSpec(*spec))


def _in_device_memory(layout):
    if not isinstance(layout, NamedSharding):
        return layout
    return NamedSharding(layout.mesh, layout.spec)


@functools.cache
def _cast(dtype, layout):
    return jax.jit(lambda x: x.astype(dtype), out_shardings=layout)


@functools.cache
def _filled(layout):
    """(stack, layer, number) -> the stack with that layer, in place."""

    def fill(stack, layer, i):
        return jax.lax.dynamic_update_index_in_dim(stack, layer.astype(stack.dtype), i, 0)

    return jax.jit(fill, donate_argnums=0, out_shardings=layout)


def _zeros(shape, dtype, layout):
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=layout)()

"""Low-rank adapters: two small factors beside a kernel, which itself stays as it is.

    y = x·W + scale · drop(x)·A·B        LoRA, https://arxiv.org/abs/2106.09685

Letters: I and O what a kernel takes and gives, R the rank.

An adapter tree is a partial copy of a model's params: where those have "kernel" [..., I, O] it has
"lora_a" [..., I, R] and "lora_b" [..., R, O], float32; leading axes, of layers and of experts, are
the kernel's. B starts at zero, so that the first output is the base's to the last bit; A is normal
with variance 1/(3·I), that of PEFT's uniform one.

A model that knows adapters (`LM.low_rank`) finds both factors beside its kernel, B scaled already,
and multiplies by one after the other: no kernel is made, and no kernel's gradient. For any other
model the product is added to the kernel.
"""

import difflib
import functools
import math
import re
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Params = Any

KERNEL, A, B, DROP = "kernel", "lora_a", "lora_b", "lora_drop"


class Drop(NamedTuple):
    """Dropout of what one kernel's adapter reads."""

    key: jax.Array
    rate: jax.Array


def scale(rank: int, alpha: float, rslora: bool = False) -> float:
    """What the product A·B is multiplied by; `rslora`: https://arxiv.org/abs/2312.03732."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def named(path: tuple[str, ...]) -> str:
    """What patterns are held against: "attention/query" for a kernel of any layer."""
    return "/".join(part for part in path[1:] if not part.isdecimal())


def targeted(tree: Any, targets: str, is_leaf=None) -> dict[tuple[str, ...], Any]:
    """Path of each part of the blocks that is to have an adapter -> its kernel.

    `tree`: of params, their shapes or their axes. Raises `ValueError` if there is none.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    paths = {tuple(entry.key for entry in path): leaf for path, leaf in leaves}
    kernels = {
        path[:-1]: leaf
        for path, leaf in paths.items()
        if path[0] == "blocks" and path[-1] == KERNEL
    }
    found = {path: leaf for path, leaf in kernels.items() if re.search(targets, named(path))}
    if not found:
        names = list(dict.fromkeys(map(named, kernels)))
        near = difflib.get_close_matches(targets, names, 6, 0.0)
        raise ValueError(
            f"an adapter's targets={targets!r} match no kernel of the model's blocks; they are "
            f"called {', '.join(near)}"
        )
    return found


def new(key: jax.Array, base: Params, targets: str, rank: int) -> Params:
    """The adapter tree of a run's start. Raises `ValueError` for a rank that no kernel has."""
    tree: Params = {}
    for path, kernel in targeted(base, targets).items():
        *batch, inputs, outputs = kernel.shape
        if rank > min(inputs, outputs):
            raise ValueError(
                f"an adapter's rank={rank} is more than the {min(inputs, outputs)} that a product "
                f"with {named(path)} [{inputs}, {outputs}] can have; set it lower, or leave that "
                "kernel out of its targets"
            )
        a = _normal(key, path, (*batch, inputs, rank))
        tree_at(tree, path).update({A: a, B: jnp.zeros((*batch, rank, outputs), jnp.float32)})
    return tree


def _normal(key, path, shape):
    """A of a kernel; the same numbers whether layers are stacked or not."""
    key = _key_of(key, path)
    draw = lambda i, shape: jax.random.normal(jax.random.fold_in(key, i), shape)
    if (layer := _layer(path)) is not None:
        a = draw(layer, shape)
    else:
        a = jax.vmap(lambda i: draw(i, shape[1:]))(jnp.arange(shape[0]))
    return a * (3 * shape[-2]) ** -0.5


def _key_of(key, path):
    return jax.random.fold_in(key, zlib.crc32(named(path).encode()))


def _layer(path):
    """The number of an unstacked layer, or None."""
    return next((int(part) for part in path if part.isdecimal()), None)


def axes(of_base: Any, targets: str) -> Any:
    """Logical axes of the adapter tree, from those of the model's params."""
    tree: Any = {}
    for path, names in targeted(of_base, targets, lambda node: isinstance(node, tuple)).items():
        *batch, takes, gives = names
        tree_at(tree, path).update({A: (*batch, takes, None), B: (*batch, None, gives)})
    return tree


def beside(base: Params, adapters: Params, scale: float) -> Params:
    """The base with the factors beside its kernels, B times `scale`; no kernel is copied."""
    return _joined(base, adapters, lambda kernel, a, b: {KERNEL: kernel, A: a, B: b * scale})


def merged(base: Params, adapters: Params, scale: float) -> Params:
    """The base with the scaled products added to its kernels, in their dtype."""
    return _joined(base, adapters, lambda kernel, a, b: {KERNEL: added(kernel, a, b, scale)})


def added(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """A kernel, or a stack of them, with the product of its adapter."""
    highest = jax.lax.Precision.HIGHEST
    product = jnp.einsum("...IR,...RO->...IO", a, b * scale, precision=highest)
    return (kernel.astype(jnp.float32) + product).astype(kernel.dtype)


def _joined(base, adapters, join: Callable):
    if A in adapters:
        return {**base, **join(base[KERNEL], adapters[A], adapters[B])}
    return {**base, **{name: _joined(base[name], part, join) for name, part in adapters.items()}}


def dropping(params: Params, key: jax.Array, rate: float) -> Params:
    """Params with adapters beside, whose inputs are dropped by that rate."""
    return _dropping(params, key, rate, ())


def _dropping(node, key, rate, path):
    if not isinstance(node, dict):
        return node
    if A not in node:
        return {name: _dropping(part, key, rate, (*path, name)) for name, part in node.items()}
    key = _key_of(key, path)
    if (layer := _layer(path)) is not None:
        return {**node, DROP: Drop(jax.random.fold_in(key, layer), jnp.float32(rate))}
    layers = len(node[A])
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(layers))
    return {**node, DROP: Drop(keys, jnp.full(layers, rate, jnp.float32))}


def dropped(x: jax.Array, drop: Drop | None) -> jax.Array:
    """x with a share of its numbers zero and the others the larger for it."""
    if drop is None:
        return x
    keep = jax.random.bernoulli(drop.key, 1 - drop.rate, x.shape)
    return jnp.where(keep, x / (1 - drop.rate).astype(x.dtype), 0)


def apart(params: Params) -> tuple[Params, dict[tuple[str, ...], dict]]:
    """Params without what stands beside kernels, and that by the path of the part it belongs to."""
    found: dict[tuple[str, ...], dict] = {}

    def without(node, path):
        if not isinstance(node, dict):
            return node
        if A in node:
            found[path] = {name: node[name] for name in (A, B, DROP) if name in node}
            node = {name: part for name, part in node.items() if name not in found[path]}
        return {name: without(part, (*path, name)) for name, part in node.items()}

    return without(params, ()), found


def taps_of(taps: Any, adapters: Params) -> Any:
    """Of a model's taps those of its adapters: of B's columns, and of A's where it tells them.

    What a kernel gives is what B's columns add to (MIGU masks by the sum of both).
    """
    if taps is None:
        return None
    if A in adapters:
        return {A: taps[A], B: taps[KERNEL]} if A in taps else {B: taps[KERNEL]}
    return {name: taps_of(taps[name], part) for name, part in adapters.items()}


def tree_at(tree: Any, path: tuple[str, ...]) -> dict:
    """The dict at a path of a nested one, made if it is not there."""
    return functools.reduce(lambda node, name: node.setdefault(name, {}), path, tree)

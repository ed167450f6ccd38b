"""Which arrays of ours hold the same numbers as which tensors of theirs, and in what form.

Letters: I and O what a kernel takes and gives, H heads, K head width, D width, E experts, F units.

A link joins some arrays of ours, by path with "blocks/<layer>/" in front, and some tensors of
theirs, by name. Its form turns one side into the other and back without touching a number, so that
import after export gives every bit back. A family is mostly one table: the parts of our names, what
stands there in theirs.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

Axes = tuple[str | None, ...]  # logical axes of an array (`jaxlm.sharding`)


@dataclasses.dataclass(frozen=True)
class Same:
    """One array, as it is."""

    def ours(self, x):
        return (x,)

    def theirs(self, x):
        return (x,)

    def axes(self, axes: Axes) -> Axes:
        return axes


@dataclasses.dataclass(frozen=True)
class Transposed:
    """[in, out] here, [out, in] there, as `torch.nn.Linear` has it."""

    def ours(self, x_OI):
        return (x_OI.T,)

    def theirs(self, x_IO):
        return (x_IO.T,)

    def axes(self, axes: Axes) -> Axes:
        return axes[::-1]


@dataclasses.dataclass(frozen=True)
class HeadwiseQKV:
    """Query, key and value of each head in turn, in one tensor [H·3·K, D] or bias [H·3·K]."""

    heads: int

    def ours(self, x):
        parts_H3K = x.reshape(self.heads, 3, -1, *x.shape[1:])
        return tuple(parts_H3K[:, i].reshape(-1, *x.shape[1:]).T for i in range(3))

    def theirs(self, *parts):
        split = [part.T.reshape(self.heads, -1, *part.shape[:-1]) for part in parts]
        return (jnp.stack(split, axis=1).reshape(-1, *parts[0].shape[:-1]),)

    def axes(self, axes: Axes) -> Axes:
        return (None,) * len(axes)


@dataclasses.dataclass(frozen=True)
class Columns:
    """Arrays side by side along their last axis, in one tensor."""

    count: int

    def ours(self, x):
        return tuple(jnp.split(x, self.count, axis=-1))

    def theirs(self, *parts):
        return (jnp.concatenate(parts, axis=-1),)

    def axes(self, axes: Axes) -> Axes:
        return (None,) * len(axes)


@dataclasses.dataclass(frozen=True)
class EachExpert:
    """[E, in, out] here, a tensor [out, in] for each expert there."""

    def ours(self, *each_OI):
        return (jnp.stack([x_OI.T for x_OI in each_OI]),)

    def theirs(self, x_EIO):
        return tuple(x_IO.T for x_IO in x_EIO)

    def axes(self, axes: Axes) -> Axes:
        return axes[:0:-1]


@dataclasses.dataclass(frozen=True)
class AllExperts:
    """Arrays [E, in, out] here, one tensor [E, outs in turn, in] there."""

    count: int

    def ours(self, x_EOI):
        return tuple(part.swapaxes(1, 2) for part in jnp.split(x_EOI, self.count, axis=1))

    def theirs(self, *parts_EIO):
        return (jnp.concatenate([part.swapaxes(1, 2) for part in parts_EIO], axis=1),)

    def axes(self, axes: Axes) -> Axes:
        return (axes[0], None, axes[1])


SAME, TRANSPOSED = Same(), Transposed()


class Link(NamedTuple):
    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    form: Any


def linked(
    paths: Iterable[str], names: Mapping[str, str], *, layer: str, kernels: Any = TRANSPOSED
) -> tuple[list[Link], list[str]]:
    """Links for those of our paths that a family knows, and the paths that it does not know.

    `names`: part of our path (behind "blocks/<layer>/", without the last name) -> theirs (behind
    `layer` with the number in it), without ".weight" and ".bias". `kernels`: their form.
    """
    links, unknown = [], []
    for path in paths:
        prefix, part, kind = _split(path, layer)
        if part not in names:
            unknown.append(path)
            continue
        form = kernels if kind == "kernel" else SAME
        links.append(Link((path,), (prefix + names[part] + _suffix(kind),), form))
    return links, unknown


def joined(
    paths: Iterable[str], parts: tuple[str, ...], name: str, layer: str, kernels: Any, biases: Any
) -> tuple[list[Link], list[str]]:
    """Links of several parts of a layer with one tensor of theirs, and the paths that are left."""
    groups: dict[tuple[str, str], dict[str, str]] = {}
    rest = []
    for path in paths:
        prefix, part, kind = _split(path, layer)
        if part in parts:
            groups.setdefault((prefix, kind), {})[part] = path
        else:
            rest.append(path)
    links = [
        Link(
            tuple(found[part] for part in parts),
            (prefix + name + _suffix(kind),),
            kernels if kind == "kernel" else biases,
        )
        for (prefix, kind), found in groups.items()
    ]
    return links, rest


def _split(path: str, layer: str) -> tuple[str, str, str]:
    """Their prefix, our part and the last name of a path of ours."""
    part, _, kind = path.rpartition("/")
    if not part.startswith("blocks/"):
        return "", part, kind
    _, number, part = part.split("/", 2)
    return layer.format(number), part, kind


def _suffix(kind: str) -> str:
    return ".bias" if kind == "bias" else ".weight"

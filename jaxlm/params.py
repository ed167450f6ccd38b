"""Params in the form that a model has them: layers stacked or not (`checkpoint.stacks`), any dtype,
any layout.

Where a checkpoint holds adapters (`models.lora`) its model is the base that the run saved once,
made whole if it is held in few bits (`models.quantized`), with their products added.

Instead of the params a run has trained, an extra of the same form may be read (`which`): their
average, or the reference that they began as.
"""

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec

import jaxlm.models.lora as lora
import jaxlm.models.quantized as quantized
from jaxlm.checkpoint import find, stacks, storage
from jaxlm.checkpoint.digest import Damaged, named, verify
from jaxlm.checkpoint.stacks import Shapes, layout_of, of_layers, places
from jaxlm.contract import BASE

Hold = Callable[[Any], Any]
"""Params, or a part of them with its place in the tree, as a run keeps them (the extra `BASE`)."""


class Kept(NamedTuple):
    """The form that params take as they are read, and its shapes, dtypes and shardings."""

    hold: Hold
    abstract: Any


class Held(NamedTuple):
    """Where a checkpoint holds a tree of params."""

    place: Path
    item: str
    prefix: str  # of its names there

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        there = _shapes(self.place, self.item).items()
        return {n.removeprefix(self.prefix): x for n, x in there if n.startswith(self.prefix)}

    def read(self, structs: Shapes) -> dict[str, jax.Array]:
        wanted = {self.prefix + name: x for name, x in structs.items()}
        arrays = storage.load(self.place, {self.item: wanted}, "sizes", part=True)[self.item]
        return {name: arrays[self.prefix + name] for name in structs}

    def beside(self, there: Shapes, name: str, kernel: jax.ShapeDtypeStruct) -> list[jax.Array]:
        """The factors that belong to a kernel, stacked as it is, though they may lie otherwise:
        the base is as it was at the start of a run. [] where there are none. `there`: shapes."""
        of_one, ((path, (_, layer)), *more) = of_layers(there), places({name: kernel}).items()
        wanted = {}
        for factor in (lora.A, lora.B):
            if (shape := of_one.get(path.removesuffix(lora.KERNEL) + factor)) is None:
                return []
            shape = shape if layer is None else (1 + len(more), *shape)
            name_here = name.removesuffix(lora.KERNEL) + factor
            wanted[name_here] = jax.ShapeDtypeStruct(shape, next(iter(there.values())).dtype)
        return list(stacks.rearranged(self.read, there, wanted).values())


def load(
    path: str | Path,
    abstract: Any,
    *,
    step: int | None = None,
    how: str = "full",
    say: Callable[[str], None] = print,
    kept: Kept | None = None,
    which: str = "",
) -> Any:
    """The params of a work folder, a model folder or a checkpoint, in the form of `abstract`, or as
    they are `kept`.

    `how` a checkpoint is verified: see `checkpoint`; `which`: see `held`. Raises `ValueError` if
    there is none, or it is of another model.
    """
    place = verified(path, step=step, how=how, which=which, say=say)
    return of_checkpoint(place, abstract, kept=kept, which=which)


def of_checkpoint(folder: Path, abstract: Any, *, kept: Kept | None = None, which: str = "") -> Any:
    """The same of the folder of one checkpoint, verified before."""
    wanted, there = named(abstract), saved_shapes(folder, which)
    same = all(x.dtype == wanted[n].dtype for n, x in there.items() if n in wanted)
    base = _base(folder)
    if of_layers(there) != of_layers(wanted):
        at, item = (base, BASE) if base else (folder, "params")
        return storage.load(at, {item: abstract}, "sizes")[item]  # tells what differs
    if not (kept or base or which) and same and there.keys() == wanted.keys():
        return storage.load(folder, {"params": abstract}, "sizes")["params"]
    read_here = functools.partial(read, folder, which=which)
    return assembled(abstract, stacks.layers(read_here, there, wanted), kept)


def verified(
    path: str | Path,
    *,
    step: int | None = None,
    best: tuple[str, bool] | None = None,
    how: str = "full",
    which: str = "",
    say: Callable[[str], None] = print,
) -> Path:
    """The folder of a checkpoint, all files that are read of it checked: those of its params or of
    the extra `which`, and of the base of adapters."""
    items = ("extras",) if which else ("params",)
    folder, checked = find(path, step=step, best=best, verify=how, items=items, say=say)
    base, place = _base(folder), held(folder, which).place
    others = {*((base,) if base else ()), *((place,) if place != folder else ())}
    for place in (*(() if checked else (folder,)), *others):
        try:
            verify(place, how, items=items if place == folder else ())
        except Damaged as error:
            raise Damaged(f"{place} cannot be used: {error}") from None
    return folder


def held(folder: Path, which: str = "") -> Held:
    """Where a checkpoint holds its params, or an extra of that name and of their form.

    Raises `ValueError` that names those there are.
    """
    if not which:
        return Held(folder, "params", "")
    paths = of_layers(_shapes(folder, "params")).keys()
    extras = {name.partition("/")[0] for name in _shapes(folder, "extras")}
    found = {name: Held(folder, "extras", f"{name}/") for name in sorted(extras)}
    for place in sorted((folder.parent / "once").glob("*/")):
        found[place.name] = Held(place, place.name, "")
    found = {name: it for name, it in found.items() if of_layers(it.shapes()).keys() == paths}
    if which not in found:
        there = f"beside its own it has {', '.join(found)}" if found else "it has its own alone"
        raise ValueError(f"--params={which}: {folder} has no such params; {there}")
    return found[which]


def saved_shapes(folder: Path, which: str = "") -> dict[str, jax.ShapeDtypeStruct]:
    """Name of each array of a checkpoint's model -> its shape and dtype."""
    if not (base := _base(folder)):
        return held(folder, which).shapes()
    there, parts = _shapes(base, BASE), _in_parts(base)
    kernels = {name: jax.eval_shape(quantized.as_it_came, of) for name, of in parts.items()}
    return {n: x for n, x in there.items() if n.rpartition("/")[0] not in parts} | kernels


def read(folder: Path, structs: Shapes, which: str = "") -> dict[str, jax.Array]:
    """Some arrays of a checkpoint's model by name, laid out as `structs` say; verified before."""
    tree = held(folder, which)
    if not (base := _base(folder)):
        return tree.read(structs)
    arrays = _read_base(base, structs)
    scale, there = adapter_facts(folder)["scale"], tree.shapes()
    for name in arrays:
        if factors := tree.beside(there, name, structs[name]):
            layout = arrays[name].sharding
            factors = jax.device_put(factors, _everywhere(layout))
            arrays[name] = _added(layout)(arrays[name], *factors, scale)
    return arrays


def _read_base(base, structs):
    """Some arrays of a base by name, whole."""
    parts = {name: of for name, of in _in_parts(base).items() if name in structs}
    wanted = {name: x for name, x in structs.items() if name not in parts}
    for name, of in parts.items():
        for part, x in of.items():
            layout = _everywhere(layout_of(structs[name]))
            wanted[f"{name}/{part}"] = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout)
    arrays = storage.load(base, {BASE: wanted}, "sizes", part=True)[BASE]
    for name, of in parts.items():
        kernel = {part: arrays.pop(f"{name}/{part}") for part in of}
        arrays[name] = _whole(layout_of(structs[name]))(kernel)
    return arrays


def _in_parts(base):
    """Name of each kernel that a base holds in few bits -> the shapes of its parts."""
    found: dict[str, dict[str, jax.ShapeDtypeStruct]] = {}
    for name, x in _shapes(base, BASE).items():
        kernel, _, part = name.rpartition("/")
        if part in quantized.PARTS:
            found.setdefault(kernel, {})[part] = x
    return found


def adapter_shapes(folder: Path) -> dict[str, jax.ShapeDtypeStruct]:
    """The same of a checkpoint's adapter; {} where it holds a whole model."""
    return _shapes(folder, "params") if _base(folder) else {}


def is_rounded(folder: Path) -> bool:
    """Whether a checkpoint is of adapters on a base that is held in few bits."""
    base = _base(folder)
    return base is not None and bool(_in_parts(base))


def adapter_facts(folder: Path) -> dict[str, Any]:
    """What the method said of a checkpoint's adapter (`contract.Adapter.about`)."""
    about = storage.read(folder).about.get("adapter", {})
    if "scale" not in about:
        raise ValueError(
            f"{folder} does not say by what its adapter's products are multiplied; it was written "
            "by an earlier version, or by a method whose Adapter.about has no 'scale'"
        )
    return about


def _shapes(folder, item):
    saved = storage.read(folder).trees.get(item, {})
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in saved.items()}


def _base(folder: Path) -> Path | None:
    """Where a checkpoint of adapters has its base; None for one of a whole model.

    Raises `ValueError` if it is not there.
    """
    if not any(name.endswith(lora.A) for name in storage.read(folder).trees.get("params", {})):
        return None
    base = folder.parent / "once" / BASE
    if not base.is_dir():
        raise ValueError(
            f"{folder} holds adapters alone, and {base}, the model that they belong to, is not "
            "there: put it back, or name the run's work folder itself"
        )
    return base


def assembled(
    abstract: Any, arrays: Iterable[tuple[str, jax.Array]], kept: Kept | None = None
) -> Any:
    """A tree like `abstract` of arrays that come by path, one layer's at a time; or as `kept`."""
    wanted = named(abstract)
    if kept:
        where = places(wanted)
        arrays = _held(kept.hold, ((p, x.astype(wanted[where[p].name].dtype)) for p, x in arrays))
        return assembled(kept.abstract, arrays)
    done = stacks.assembled(wanted, arrays)
    return jax.tree.unflatten(jax.tree.structure(abstract), [done[name] for name in wanted])


def _held(hold, arrays):
    """Arrays by path, each turned into what it is kept as."""
    for path, array in arrays:
        nest = lambda tree, name: {name: tree}
        yield from named(hold(functools.reduce(nest, reversed(path.split("/")), array))).items()


@functools.cache
def _added(layout):
    """(kernel, A, B, scale) -> the kernel with the product, in place."""
    return jax.jit(lora.added, donate_argnums=0, out_shardings=layout)


@functools.cache
def _whole(layout):
    return jax.jit(quantized.as_it_came, out_shardings=layout)


def _everywhere(layout):
    """The layout of a whole copy on each of its devices."""
    if not isinstance(layout, NamedSharding):
        return layout
    return NamedSharding(layout.mesh, PartitionSpec())

"""The mesh, and which of its axes each logical axis lies on.

Mesh axes: `data` (replicas, across slices), `fsdp` (rows of the batch and shards of the params),
`sequence` (positions), `tensor` (heads, FFN units, vocabulary). Models name logical axes only; the
one table below says where each lies. Ask the mesh for its platform, never the process: while
compiling ahead of time for a TPU, the process itself runs on a CPU.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxlm.contract import LM

HOST = "pinned_host"  # the kind of memory that a device reads and writes by itself
MESH_AXES = ("data", "fsdp", "sequence", "tensor")

LOGICAL = {
    # of activations
    "batch": ("data", "fsdp"),
    "length": "sequence",
    "width": None,
    # of parameters and activations alike
    "heads": "tensor",
    "kv_heads": "tensor",
    "ffn": "tensor",
    "vocabulary": "tensor",
    # of parameters only
    "embed": "fsdp",
    "positions": None,
    "experts": None,  # each device has a slice of all, by "embed" and "ffn"
    "experts_over_fsdp": "fsdp",  # or whole ones: `config.model.experts_over`
    "experts_over_tensor": "tensor",
    "layers": None,
    "norm": None,
}
EXPERTS = tuple(name for name in LOGICAL if name.startswith("experts"))


@dataclasses.dataclass(frozen=True)
class MeshSpec:
    """Devices along each mesh axis; -1 once means all that are left."""

    data: int = 1
    fsdp: int = -1
    sequence: int = 1
    tensor: int = 1

    def sizes(self, devices: int) -> tuple[int, ...]:
        """Sizes along `MESH_AXES` for that many devices. Raises `ValueError` if they cannot fit."""
        sizes = [getattr(self, axis) for axis in MESH_AXES]
        said = " × ".join(f"{a}={s}" for a, s in zip(MESH_AXES, sizes, strict=True))
        if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
            raise ValueError(f"mesh {said}: each size is at least 1, and at most one may be -1")
        known = math.prod(s for s in sizes if s != -1)
        if -1 in sizes:
            sizes[sizes.index(-1)] = max(devices // known, 1)
        if math.prod(sizes) != devices:
            raise ValueError(
                f"mesh {said} needs {'a multiple of ' if -1 in sizes else ''}{known} devices, "
                f"and {devices} {'is' if devices == 1 else 'are'} here; change --config.mesh.*"
            )
        return tuple(sizes)


def make_mesh(spec: MeshSpec, devices=None, *, explicit: bool = False) -> Mesh:
    """The one place a mesh is made. `devices` defaults to all of them.

    Of several TPU slices, which only a slower network joins, `data` is the axis between them.
    """
    devices = jax.devices() if devices is None else devices
    kinds = (AxisType.Explicit if explicit else AxisType.Auto,) * len(MESH_AXES)
    sizes, slices = spec.sizes(len(devices)), _slices(devices)
    if len(slices) == 1:
        return Mesh(_grid(sizes, devices), MESH_AXES, axis_types=kinds)
    if sizes[0] % len(slices):
        raise ValueError(
            f"config.mesh.data={sizes[0]} is the axis between the {len(slices)} TPU slices here: "
            f"it has to be a multiple of {len(slices)}"
        )
    inner = (sizes[0] // len(slices), *sizes[1:])
    grids = [_grid(inner, part) for part in slices]
    return Mesh(np.concatenate(grids), MESH_AXES, axis_types=kinds)


def _grid(sizes, devices) -> np.ndarray:
    """The devices of one slice, neighbours along the axes that send most."""
    kinds = (AxisType.Auto,) * len(sizes)
    try:
        return jax.make_mesh(sizes, MESH_AXES, axis_types=kinds, devices=devices).devices
    except NotImplementedError:  # 8 of 4 × 4 × 4: an axis and half of another one
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)


def _slices(devices) -> list[list]:
    """The devices of each TPU slice; anything else is one."""
    number = lambda d: (getattr(d, "slice_index", 0) or 0) if d.platform == "tpu" else 0
    return [[d for d in devices if number(d) == n] for n in sorted({number(d) for d in devices})]


def spec_of(*logical: str | None) -> PartitionSpec:
    """The partition spec of an array whose axes have these logical names (None = not split)."""
    return PartitionSpec(*(LOGICAL[name] if name else None for name in logical))


def param_shardings(axes: Any, shapes: Any, mesh: Mesh) -> Any:
    """Shardings of a tree of params from its logical axes.

    An axis that its mesh axes do not divide is left whole (a vocabulary of 50,257, say). A param
    may consist of several arrays with the same axes (`models.quantized`).
    """
    one = lambda names, leaf: NamedSharding(mesh, fitting_spec(names, leaf.shape, mesh))
    each = lambda names, param: jax.tree.map(functools.partial(one, names), param)
    return jax.tree.map(each, axes, shapes, is_leaf=lambda x: isinstance(x, tuple))


def abstract_params(lm: LM, mesh: Mesh) -> Any:
    """Shapes, dtypes and shardings of a model's params, without making them."""
    shapes = jax.eval_shape(lm.init, jax.random.key(0))
    place = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
    return jax.tree.map(place, shapes, param_shardings(lm.axes, shapes, mesh))


def fitting_spec(logical: tuple[str | None, ...], shape: tuple[int, ...], mesh) -> PartitionSpec:
    """`spec_of`, but for the axes that their mesh axes do not divide."""
    ways = lambda axis: math.prod(mesh.shape[a] for a in _tuple(axis))
    spec = spec_of(*logical)
    return PartitionSpec(
        *(axis if size % ways(axis) == 0 else None for axis, size in zip(spec, shape, strict=True))
    )


def refuse_replicated(axes: Any, shapes: Any, mesh: Mesh, limit: float = 0.02) -> None:
    """Raises `ValueError` if devices would hold much more of the params than their part.

    `limit`: share of the bytes of the params that may be copies, since some axis that should be
    split is one that the mesh does not divide.
    """
    found, total = [], 0
    names = jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple))
    for (path, leaf), logical in zip(
        jax.tree_util.tree_leaves_with_path(shapes), names, strict=True
    ):
        size = math.prod(leaf.shape) * leaf.dtype.itemsize
        ways = lambda spec: math.prod(mesh.shape[a] for axis in spec for a in _tuple(axis))
        parts, wanted = ways(fitting_spec(logical, leaf.shape, mesh)), ways(spec_of(*logical))
        total += size
        if parts < wanted:
            size *= 1 - parts / wanted
            where = "/".join(str(entry.key) for entry in path)
            split = " × ".join(
                f"{n} over {'×'.join(_tuple(LOGICAL[axis]))}"
                for axis, n in zip(logical, leaf.shape, strict=True)
                if axis and LOGICAL[axis] and ways((LOGICAL[axis],)) > 1
            )
            found.append((size, f"{where} ({split})"))
    share = sum(size for size, _ in found) / total
    if share > limit:
        largest = ", ".join(text for _, text in sorted(found, reverse=True)[:3])
        sizes = " × ".join(f"{axis}={n}" for axis, n in mesh.shape.items())
        raise ValueError(
            f"mesh {sizes} would leave {share:.0%} of the parameter bytes replicated that should "
            f"be split, since its sizes do not divide theirs: {largest}; change --config.mesh.* or "
            "the model's sizes"
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over all data-parallel axes; what every batch array enters the step with."""
    return NamedSharding(mesh, spec_of("batch"))


def put_rows(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """A batch that every host holds whole, its rows onto the mesh."""
    rows = batch_sharding(mesh)
    make = lambda v: jax.make_array_from_callback(v.shape, rows, lambda i: v[i])
    return {name: make(value) for name, value in batch.items()}


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def rows_divide_by(mesh: Mesh) -> int:
    """What the rows of a batch must be a multiple of."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def ways(logical: str) -> int:
    """Devices of the current mesh that an axis of this name is split over."""
    shape = dict(jax.sharding.get_abstract_mesh().shape)
    return math.prod(shape.get(axis, 1) for axis in _tuple(LOGICAL[logical]))


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """Lays `x` out by its logical axes under the current mesh; without a mesh, returns it.

    As of params, an axis that its mesh axes do not divide is left whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    spec = fitting_spec(logical, x.shape, mesh)
    if mesh.are_all_axes_explicit:
        return jax.sharding.reshard(x, spec)
    return jax.lax.with_sharding_constraint(x, spec)


def take_rows(table: jax.Array, ids: jax.Array, *logical: str | None) -> jax.Array:
    """`table[ids]`, laid out by the logical axes of the result, in either axis mode."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.are_all_axes_explicit:
        return table.at[ids].get(out_sharding=spec_of(*logical))
    return constrain(table[ids], *logical)


def left_to_the_compiler(fn, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """`fn(*arrays)`, whose results lie as the arrays do, whatever it does in between.

    For what has no layout worth naming: where axes are explicit they are automatic inside.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not mesh.are_all_axes_explicit:
        return fn(*arrays)
    layouts = tuple(jax.typeof(x).sharding for x in arrays)
    inside: Callable = jax.sharding.auto_axes(fn, out_sharding=layouts)
    return inside(*arrays)


def has_host_memory(mesh: Mesh) -> bool:
    """Whether the devices of a mesh can read and write memory of their hosts."""
    device = mesh.devices.flat[0]
    return HOST in {memory.kind for memory in device.addressable_memories()}


def in_host_memory(axes: list[tuple], shardings: Any) -> Any:
    """The same shardings, in the hosts' memory for what belongs to matrices of the params.

    `axes`: the logical ones of each leaf. Vectors stay, stacked ones too: there is little of them,
    and a TPU cannot cut a bfloat16 row out of what lies on its host.
    """
    leaves, structure = jax.tree.flatten(shardings)
    there = [sum(name not in (None, "layers") for name in names) >= 2 for names in axes]
    return structure.unflatten(
        [x.with_memory_kind(HOST) if to else x for x, to in zip(leaves, there, strict=True)]
    )


def platform(mesh: Mesh) -> str:
    """The platform the mesh's devices belong to: `cpu`, `gpu` or `tpu`."""
    name: str = mesh.devices.flat[0].platform
    return "gpu" if name in ("cuda", "rocm") else name


def _tuple(axis):
    return () if axis is None else (axis,) if isinstance(axis, str) else axis

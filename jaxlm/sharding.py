"""The mesh, and which of its axes each logical axis lies on.

Mesh axes: `data` (replicas, across slices), `fsdp` (rows of the batch and shards of the params),
`sequence` (positions), `tensor` (heads, FFN units, vocabulary). Models name logical axes only; the
one table below says where each lies. Ask the mesh for its platform, never the process: while
compiling ahead of time for a TPU, the process itself runs on a CPU.
"""

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

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
    "layers": None,
    "norm": None,
}


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
    """The one place a mesh is made. `devices` defaults to all of them."""
    devices = jax.devices() if devices is None else devices
    kind = AxisType.Explicit if explicit else AxisType.Auto
    return jax.make_mesh(
        spec.sizes(len(devices)), MESH_AXES, axis_types=(kind,) * len(MESH_AXES), devices=devices
    )


def spec_of(*logical: str | None) -> PartitionSpec:
    """The partition spec of an array whose axes have these logical names (None = not split)."""
    return PartitionSpec(*(LOGICAL[name] if name else None for name in logical))


def param_shardings(axes: Any, shapes: Any, mesh: Mesh) -> Any:
    """Shardings of a tree of params from its logical axes.

    An axis that its mesh axes do not divide is left whole (a vocabulary of 50,257, say).
    """

    one = lambda names, leaf: NamedSharding(mesh, fitting_spec(names, leaf.shape, mesh))
    return jax.tree.map(one, axes, shapes, is_leaf=lambda x: isinstance(x, tuple))


def fitting_spec(logical: tuple[str | None, ...], shape: tuple[int, ...], mesh) -> PartitionSpec:
    """`spec_of`, but for the axes that their mesh axes do not divide."""
    ways = lambda axis: math.prod(mesh.shape[a] for a in _tuple(axis))
    spec = spec_of(*logical)
    return PartitionSpec(
        *(axis if size % ways(axis) == 0 else None for axis, size in zip(spec, shape, strict=True))
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over all data-parallel axes; what every batch array enters the step with."""
    return NamedSharding(mesh, spec_of("batch"))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def rows_divide_by(mesh: Mesh) -> int:
    """What the rows of a batch must be a multiple of."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


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


def platform(mesh: Mesh) -> str:
    """The platform the mesh's devices belong to: `cpu`, `gpu` or `tpu`."""
    name: str = mesh.devices.flat[0].platform
    return "gpu" if name in ("cuda", "rocm") else name


def _tuple(axis):
    return () if axis is None else (axis,) if isinstance(axis, str) else axis

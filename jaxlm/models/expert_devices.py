"""Experts on the devices of a mesh: how tokens and kernels lie, whichever way these are split.

Tokens lie as in all layers; of the kernels the experts are split over one axis of the mesh, or the
width of each over another one, or both. What is the work of one device is for `experts` and
`expert_shards` to say.

Letters: B batch, L length, D width; C experts chosen for each token.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec

from jaxlm.models import quantized
from jaxlm.models.attention_shards import axes_of
from jaxlm.models.options import DecoderConfig


class Split(NamedTuple):
    """The axes of the mesh that split these; () where none does."""

    tokens: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()
    width: tuple[str, ...] = ()  # of every expert


def on_each_device(
    apply: Callable, config: DecoderConfig, kernels, x_BLD, chosen_BLC, weights_BLC, mask_BL
) -> tuple[jax.Array, dict[str, Any]]:
    """`apply(split, kernels, ...)` of what each device has: its tokens' outputs, and of each kernel
    the sums over all tokens of mask·|y| [E, O] and of mask [E]."""
    mesh = jax.sharding.get_abstract_mesh()
    operands = kernels, x_BLD, chosen_BLC, weights_BLC, mask_BL
    if mesh.empty or (mesh.size == 1 and not mesh.are_all_axes_explicit):
        return apply(Split(), *operands)
    over, (B, L) = config.experts_over, mask_BL.shape
    stored = quantized.rows_of(kernels["down"][0])  # which are split
    rows, length = axes_of(mesh, "batch", B), axes_of(mesh, "length", L)
    experts = axes_of(mesh, f"experts_over_{over}", config.experts) if over else None
    width = axes_of(mesh, "ffn", stored) if over != "tensor" else None
    features = PartitionSpec(rows, length, None)
    of_kernels, of_taps = {}, {}
    for name, (_, *factors) in kernels.items():
        takes, gives = (width, None) if name == "down" else (None, width)
        beside = PartitionSpec(experts, takes, None), PartitionSpec(experts, None, gives)
        of_kernels[name] = PartitionSpec(experts, takes, gives), *(beside if factors else ())
        of_taps[name] = PartitionSpec(experts, gives), PartitionSpec(experts)
    specs = of_kernels, features, features, features, PartitionSpec(rows, length)
    if mesh.are_all_axes_explicit:
        operands = jax.tree.map(jax.sharding.reshard, operands, specs)
    split = Split((*(rows or ()), *(length or ())), experts or (), width or ())
    return jax.shard_map(
        functools.partial(apply, split),
        in_specs=specs,
        out_specs=(features, of_taps),
        check_vma=False,
    )(*operands)


def summed(tree: Any, axes: tuple[str, ...]) -> Any:
    """Of the devices along these axes of the mesh."""
    return jax.lax.psum(tree, axes) if axes else tree

"""A kernel that knows nothing of a mesh, run by each device on its own part of the rows and heads.

Kernels written for one device cannot be split by the compiler, so they run inside `jax.shard_map`:
rows lie over the axes of "batch", heads over that of "heads", each only where it divides. Key and
value heads that are fewer than their axis has devices are repeated, so that each device has those
of its queries.

Letters: B batch, L length, H query heads, G key/value heads, K head width.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxlm.sharding import LOGICAL


def on_each_device(
    attend: Callable[..., jax.Array],
    query_BLHK: jax.Array,
    key_BLGK: jax.Array,
    value_BLGK: jax.Array,
    *tokens_BL: jax.Array,
    split_length: bool = False,
) -> jax.Array:
    """`attend` of these arrays, called by each device of the current mesh with what it holds.

    Rows come whole, or with `split_length` in the runs that the axis of "length" splits them in.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or (mesh.size == 1 and not mesh.are_all_axes_explicit):
        return attend(query_BLHK, key_BLGK, value_BLGK, *tokens_BL)
    B, L, H, _ = query_BLHK.shape
    rows = axes_of(mesh, "batch", B)
    length = axes_of(mesh, "length", L) if split_length else None
    heads = axes_of(mesh, "heads", H)
    if heads:
        ways = math.prod(mesh.shape[axis] for axis in heads)
        key_BLGK, value_BLGK = (_enough_heads(x, ways, H) for x in (key_BLGK, value_BLGK))
    of_heads, of_tokens = PartitionSpec(rows, length, heads, None), PartitionSpec(rows, length)
    specs = (*[of_heads] * 3, *[of_tokens] * len(tokens_BL))
    operands = query_BLHK, key_BLGK, value_BLGK, *tokens_BL
    if mesh.are_all_axes_explicit:
        operands = tuple(map(jax.sharding.reshard, operands, specs))
    return jax.shard_map(attend, in_specs=specs, out_specs=of_heads, check_vma=False)(*operands)


def tokens_on_each_device(fn: Callable[[jax.Array], jax.Array], x_BLD: jax.Array) -> jax.Array:
    """`fn` of each device's own rows and positions."""
    mesh = jax.sharding.get_abstract_mesh()
    B, L, _ = x_BLD.shape
    spec = PartitionSpec(axes_of(mesh, "batch", B), axes_of(mesh, "length", L), None)
    return jax.shard_map(fn, in_specs=spec, out_specs=spec)(x_BLD)


def axes_of(mesh, logical, size):
    """The mesh axes of a logical one, if together they divide that size; else None."""
    axes = LOGICAL[logical]
    axes = tuple(a for a in ((axes,) if isinstance(axes, str) else axes) if a in mesh.shape)
    ways = math.prod(mesh.shape[axis] for axis in axes)
    return axes if axes and size % ways == 0 else None


def _enough_heads(x_BLGK, ways, query_heads):
    """Key or value heads repeated until `ways` devices can each hold those of their queries."""
    G = x_BLGK.shape[2]
    more = math.lcm(G, ways)
    if query_heads % more:  # then one for every query head
        more = query_heads
    return x_BLGK if more == G else jnp.repeat(x_BLGK, more // G, axis=2)

"""Rows of an embedding table that is split over devices, by its vocabulary and by its width.

Letters: B rows, L positions, V vocabulary, D width.

Left to itself the compiler makes all rows of the whole batch on every device where positions are
split too. Here each device looks up, in the piece of the table that it stores, the tokens of all
devices that store the other widths of the same rows; the pieces of the vocabulary are summed (one
of them is not zero), and then widths are exchanged for rows. What travels is as large as the result
and in its dtype; the table, larger as a rule, stays where it is, and so does its gradient.
"""

import functools

import jax
import jax.numpy as jnp

from jaxlm import sharding

VOCABULARY, WIDTH = sharding.LOGICAL["vocabulary"], sharding.LOGICAL["embed"]


def rows(table_VD: jax.Array, tokens_BL: jax.Array, dtype) -> jax.Array:
    """`table[tokens]`, [B, L, D] in `dtype`, laid out as activations are."""
    layout = "batch", "length", "width"
    mesh = jax.sharding.get_abstract_mesh()
    splits = *zip(("batch", "length"), tokens_BL.shape, strict=True), *_of_table(table_VD)
    fits = all(size % sharding.ways(name) == 0 for name, size in splits)
    if mesh.empty or mesh.size == 1 or mesh.are_all_axes_explicit or not fits:
        return sharding.take_rows(table_VD, tokens_BL, *layout).astype(dtype)
    exchange = jax.shard_map(
        functools.partial(_exchange, dtype),
        in_specs=(sharding.spec_of("vocabulary", "embed"), sharding.spec_of("batch", "length")),
        out_specs=sharding.spec_of(*layout),
    )
    return exchange(table_VD, tokens_BL)


def _of_table(table_VD):
    return zip(("vocabulary", "embed"), table_VD.shape, strict=True)


def _exchange(dtype, table_VD, tokens_BL):
    tokens_BL = jax.lax.all_gather(tokens_BL, WIDTH, axis=0, tiled=True)
    here_BL = tokens_BL - jax.lax.axis_index(VOCABULARY) * table_VD.shape[0]
    stored_BL = (here_BL >= 0) & (here_BL < table_VD.shape[0])
    x_BLD = table_VD[jnp.where(stored_BL, here_BL, 0)].astype(dtype)
    x_BLD = jax.lax.psum(jnp.where(stored_BL[:, :, None], x_BLD, 0), VOCABULARY)
    return jax.lax.all_to_all(x_BLD, WIDTH, split_axis=0, concat_axis=2, tiled=True)

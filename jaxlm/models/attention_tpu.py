"""Attention for TPUs: JAX's splash attention, a flash kernel that skips what a mask hides.

Letters: B batch, L length, H query heads, G key/value heads, K head width.

The causal mask and the window are by the order of tokens in a row, which is that of the positions
of each document where it lies in one piece, as packing leaves it; segments keep documents apart.
The kernel is written for one device and wants whole blocks: it runs inside `jax.shard_map`, on rows
padded to a multiple of 128 tokens. `interpret` runs it on any platform, slowly, for the tests.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as library

from jaxlm.models.attention_shards import on_each_device

LANES = 128  # tokens that a block is a multiple of
BLOCKS = (512, 256, 128)  # tokens of a block; the larger are faster. Not tuned.


def splash(
    query_BLHK,
    key_BLGK,
    value_BLGK,
    *,
    segments_BL,
    positions_BL,
    window,
    soft_cap,
    interpret=False,
):
    """What `attention.attention` promises, for packed rows."""
    del positions_BL
    length = query_BLHK.shape[1]
    short = -length % LANES
    pad = lambda x: jnp.pad(x, [(0, 0), (0, short)] + [(0, 0)] * (x.ndim - 2))
    out_BLHK = on_each_device(
        functools.partial(_attend, window=window, soft_cap=soft_cap, interpret=interpret),
        *map(pad, (query_BLHK, key_BLGK, value_BLGK, segments_BL)),
    )
    return out_BLHK[:, :length]


def _attend(query_BLHK, key_BLGK, value_BLGK, segments_BL, *, window, soft_cap, interpret):
    _, L, H, K = query_BLHK.shape
    kernel = _kernel(L, H, window, soft_cap, interpret)
    query_BLHK = (query_BLHK * K**-0.5).astype(query_BLHK.dtype)
    heads_first = (x.swapaxes(1, 2) for x in (query_BLHK, key_BLGK, value_BLGK))
    segments = library.SegmentIds(segments_BL, segments_BL)
    out_BHLK: Any = jax.vmap(kernel)(*heads_first, segments)
    return out_BHLK.swapaxes(1, 2)


def _kernel(length, heads, window, soft_cap, interpret):
    """(query [H, L, K], key [G, L, K], value, segments) -> [H, L, K]; G divides H."""
    shape = length, length
    mask = library.LocalMask(shape, (window - 1, 0), 0) if window else library.CausalMask(shape)
    block = next(size for size in BLOCKS if length % size == 0)
    sizes = library.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    return library.make_splash_mha(
        library.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=soft_cap or None,
        residual_checkpoint_name="attended",
        interpret=interpret,
    )

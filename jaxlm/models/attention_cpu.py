"""Causal attention for CPUs: in pieces that stay in the cache, recomputed in the backward pass.

Letters: B rows taken together, N steps of B rows, L length, G key/value heads, R query heads per
key/value head (H = G·R), K head width; Q queries of a block (S = Q·R with their heads), M the keys
that a block meets.

A block of queries meets only the keys that its last query can see, so nearly half of the products
are never made; a step takes a few rows through all their blocks, so no scores reach main memory.
As in FlashAttention (arXiv 2205.14135) the backward pass recomputes the scores from the log of
each softmax's sum; unlike there a block meets all its keys at once, not tile by tile.

It is meant for one device and for documents that lie in one piece in their row, as packing leaves
them: it never looks at a key right of the query, or `window` or more to its left.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxlm.models.masks import MASKED, visible

QUERIES = 64  # of a block; 32 to 128 cost about the same, 256 and more cost more
BLOCKS = 16  # at most, since each is written out in the program
SCORES = 2**18  # of one piece: 1 MB of float32, a core's second-level cache


class Options(NamedTuple):
    window: int
    soft_cap: float


def cpu_blocks(query_BLHK, key_BLGK, value_BLGK, *, segments_BL, positions_BL, window, soft_cap):
    """What `attention.attention` promises, for packed rows."""
    B, L, H, K = query_BLHK.shape
    G = key_BLGK.shape[2]
    N = B // _rows_at_a_time(B, L, H)
    split = lambda x: x.reshape(N, B // N, *x.shape[1:])
    query_NBGLRK = split(query_BLHK.reshape(B, L, G, H // G, K).swapaxes(1, 2))
    key_NBGLK, value_NBGLK = (split(x.swapaxes(1, 2)) for x in (key_BLGK, value_BLGK))
    # Outside of the scan, or every head and both passes over the scores would make it anew.
    seen_NBLM = split(visible(segments_BL, positions_BL, window))
    options = Options(window, soft_cap)
    out_NBGLRK: jax.Array = _attend(options, query_NBGLRK, key_NBGLK, value_NBGLK, seen_NBLM)
    return out_NBGLRK.reshape(B, G, L, H // G, K).swapaxes(1, 2).reshape(B, L, H, K)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options, query_NBGLRK, key_NBGLK, value_NBGLK, seen_NBLM):
    return _forward(options, query_NBGLRK, key_NBGLK, value_NBGLK, seen_NBLM)[0]


def _forward(options, *operands):
    out, lse = _each_step(functools.partial(_forward_rows, options), operands)
    out, lse = (checkpoint_name(x, "attended") for x in (out, lse))
    return out, (*operands, out, lse)


def _backward(options, residuals, d_out):
    gradients = _each_step(functools.partial(_backward_rows, options), (*residuals, d_out))
    return *gradients, None  # nothing for the mask


_attend.defvjp(_forward, _backward)


def _forward_rows(options, query_BGLRK, key_BGLK, value_BGLK, seen_BLM):
    """The output, and the log of what each query's softmax divides by."""
    outs, lses = [], []
    for queries, keys in _blocks(query_BGLRK.shape[2], options.window):
        seen_BQM = seen_BLM[:, queries, keys]
        query_BGSK, value_BGMK = _rows(query_BGLRK[:, :, queries]), value_BGLK[:, :, keys]
        scores_BGQRM, _ = _scores(options, query_BGSK, key_BGLK[:, :, keys], seen_BQM)
        top_BGQR1 = jnp.max(scores_BGQRM, axis=-1, keepdims=True)
        weights_BGQRM = jnp.exp(scores_BGQRM - top_BGQR1)
        sum_BGQR1 = jnp.sum(weights_BGQRM, axis=-1, keepdims=True)
        weights_BGSM = _rows(weights_BGQRM).astype(value_BGMK.dtype)
        out_BGSK = _product("BGSM,BGMK->BGSK", weights_BGSM, value_BGMK)
        out_BGQRK = out_BGSK.reshape(query_BGLRK[:, :, queries].shape) / sum_BGQR1
        outs.append(out_BGQRK.astype(query_BGLRK.dtype))
        lses.append(top_BGQR1 + jnp.log(sum_BGQR1))
    return jnp.concatenate(outs, axis=2), jnp.concatenate(lses, axis=2)


def _backward_rows(options, query_BGLRK, key_BGLK, value_BGLK, seen_BLM, out, lse, d_out):
    """Gradients of query, key and value; those of key and value grow as [..., K, L] in float32."""
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1, keepdims=True)
    d_query = []
    d_key_BGKL = d_value_BGKL = jnp.zeros(key_BGLK.swapaxes(2, 3).shape, jnp.float32)
    for queries, keys in _blocks(query_BGLRK.shape[2], options.window):
        seen_BQM = seen_BLM[:, queries, keys]
        query_BGSK, d_out_BGSK = _rows(query_BGLRK[:, :, queries]), _rows(d_out[:, :, queries])
        key_BGMK, value_BGMK = key_BGLK[:, :, keys], value_BGLK[:, :, keys]
        scores_BGQRM, slope = _scores(options, query_BGSK, key_BGMK, seen_BQM)
        weights_BGQRM = jnp.exp(scores_BGQRM - lse[:, :, queries])
        d_weights_BGSM = _product("BGSK,BGMK->BGSM", d_out_BGSK, value_BGMK)
        d_weights_BGQRM = d_weights_BGSM.reshape(weights_BGQRM.shape)
        d_scores_BGQRM = weights_BGQRM * (d_weights_BGQRM - delta[:, :, queries]) * slope
        d_scores_BGSM, weights_BGSM = (
            _rows(x).astype(query_BGLRK.dtype) for x in (d_scores_BGQRM, weights_BGQRM)
        )
        d_query.append(_product("BGSM,BGMK->BGSK", d_scores_BGSM, key_BGMK))
        # As [K, M], two to three times faster: the larger operand is then read as it lies.
        d_key = _product("BGSK,BGSM->BGKM", query_BGSK, d_scores_BGSM)
        d_value = _product("BGSK,BGSM->BGKM", d_out_BGSK, weights_BGSM)
        d_key_BGKL = d_key_BGKL.at[..., keys].add(d_key)
        d_value_BGKL = d_value_BGKL.at[..., keys].add(d_value)
    d_query = jnp.concatenate(d_query, axis=2).reshape(query_BGLRK.shape)
    gradients = d_query, d_key_BGKL.swapaxes(2, 3), d_value_BGKL.swapaxes(2, 3)
    return tuple(x.astype(query_BGLRK.dtype) for x in gradients)


def _scores(options, query_BGSK, key_BGMK, seen_BQM):
    """Scores, capped and masked, [B, G, Q, R, M], and their derivative by query · key."""
    B, Q, M = seen_BQM.shape
    G, K = key_BGMK.shape[1], key_BGMK.shape[3]
    scores_BGSM = _product("BGSK,BGMK->BGSM", query_BGSK, key_BGMK)
    slope = K**-0.5
    scores_BGQRM = scores_BGSM.reshape(B, G, Q, -1, M) * slope
    if options.soft_cap:
        tanh_BGQRM = jnp.tanh(scores_BGQRM / options.soft_cap)
        scores_BGQRM, slope = options.soft_cap * tanh_BGQRM, slope * (1 - tanh_BGQRM**2)
    return jnp.where(seen_BQM[:, None, :, None], scores_BGQRM, MASKED), slope


def _block_size(length):
    return max(QUERIES, -(-length // BLOCKS))


def _blocks(length, window):
    """Each block's queries, and the keys between the first and the last that they see."""
    size = _block_size(length)
    for start in range(0, length, size):
        stop = min(start + size, length)
        yield slice(start, stop), slice(max(0, start - window + 1) if window else 0, stop)


def _rows(x_BGQRK):
    """[B, G, Q, R, K] -> [B, G, Q·R, K]."""
    return x_BGQRK.reshape(*x_BGQRK.shape[:2], -1, x_BGQRK.shape[-1])


def _product(equation, x, y):
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


def _each_step(rows, operands):
    return jax.lax.scan(lambda _, operands: (None, rows(*operands)), None, operands)[1]


def _rows_at_a_time(rows, length, heads):
    """As many as keep a block's scores in the cache, and divide all rows."""
    fitting = SCORES // (heads * length * _block_size(length))
    return max(n for n in range(1, rows + 1) if rows % n == 0 and n <= max(1, fitting))

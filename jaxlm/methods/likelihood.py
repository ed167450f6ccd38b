"""The log-probability a model gives to a batch's targets, never holding the logits of all of it.

B rows, L positions, D width, V vocabulary; N chunks of C positions of every row, N * C >= L.

A chunk takes every N-th position, not a run of them: an array whose rows or positions are split
over devices stays split that way, and making the chunks moves no data between devices.

`summed_nll` goes further than rematerialisation: when differentiated it takes the gradient of each
chunk while the chunk's logits exist, so these are computed once and not twice. That gradient can
not be differentiated again; `token_logprobs` has no such limit.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.contract import LM, Batch, Params


def token_logprobs(
    lm: LM, params: Params, batch: Batch, key: jax.Array | None = None
) -> tuple[jax.Array, Any, dict[str, jax.Array]]:
    """log p(target) in nats at every position, [B, L] float32; then the model's taps and penalties.

    Logits of about `lm.chunk` tokens exist at a time, in the backward pass too.
    """
    hidden_BLD, taps, penalties = lm.hidden(params, batch, key)
    chunks = _number_of_chunks(lm.chunk, hidden_BLD.shape)

    def score(hidden_BCD, targets_BC):
        return _logprobs(lm.unembed(params, hidden_BCD), targets_BC)

    score = jax.named_scope("loss")(score)
    if chunks == 1:
        return score(hidden_BLD, batch["targets"]), taps, penalties
    score = jax.checkpoint(score, prevent_cse=False)  # a scan keeps the two passes apart anyway
    xs = _split(hidden_BLD, chunks), _split(batch["targets"], chunks)
    _, logprobs_NBC = jax.lax.scan(lambda carry, x: (carry, score(*x)), None, xs)
    return _join(logprobs_NBC, hidden_BLD.shape[1]), taps, penalties


def summed_nll(
    lm: LM, params: Params, batch: Batch, key: jax.Array | None = None
) -> tuple[jax.Array, Any, dict[str, jax.Array]]:
    """Sum over tokens of -weight * log p(target) in nats, [] float32; then taps and penalties."""
    hidden_BLD, taps, penalties = lm.hidden(params, batch, key)
    chunks = _number_of_chunks(lm.chunk, hidden_BLD.shape)
    hidden_NBCD, targets_NBC, weights_NBC = (
        _split(x, chunks) for x in (hidden_BLD, batch["targets"], batch["weights"])
    )
    # Makes arguments of the params that the head reads, and of no others: their gradients are
    # accumulated over the chunks.
    unembed, head = jax.closure_convert(lambda h: lm.unembed(params, h), hidden_NBCD[0])
    with jax.named_scope("loss"):
        nll: jax.Array = _summed_nll(unembed, head, hidden_NBCD, weights_NBC, targets_NBC)
    return nll, taps, penalties


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed_nll(unembed, head, hidden_NBCD, weights_NBC, targets_NBC):
    def add(total, chunk):
        hidden_BCD, weights_BC, targets_BC = chunk
        logprobs_BC = _logprobs(unembed(hidden_BCD, *head), targets_BC)
        return total - jnp.sum(weights_BC * logprobs_BC), None

    zero = jnp.zeros((), jnp.float32)
    return jax.lax.scan(add, zero, (hidden_NBCD, weights_NBC, targets_NBC))[0]


def _forward(unembed, head, hidden_NBCD, weights_NBC, targets_NBC):
    """The sum, and all gradients for a cotangent of one."""

    def nll(head, hidden_BCD, weights_BC, targets_BC):
        logprobs_BC = _logprobs(unembed(hidden_BCD, *head), targets_BC)
        return -jnp.sum(weights_BC * logprobs_BC)

    def add(carry, chunk):
        total, d_head = carry
        value, (d_here, *d_chunk) = jax.value_and_grad(nll, argnums=(0, 1, 2))(head, *chunk)
        return (total + value, jax.tree.map(jnp.add, d_head, d_here)), d_chunk

    zeros = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), head)
    carry = jnp.zeros((), jnp.float32), zeros
    (total, d_head), d_chunks = jax.lax.scan(add, carry, (hidden_NBCD, weights_NBC, targets_NBC))
    d_head = jax.tree.map(lambda d, p: d.astype(p.dtype), d_head, head)
    return total, (d_head, *d_chunks)


def _backward(unembed, gradients, cotangent):
    del unembed
    scaled = jax.tree.map(lambda g: (g * cotangent).astype(g.dtype), gradients)
    return (*scaled, None)  # targets are integers


_summed_nll.defvjp(_forward, _backward)


def _logprobs(logits_BCV, targets_BC):
    """The logits' log-softmax at the targets, float32, whatever the logits' type."""
    logits_BCV = logits_BCV.astype(jnp.float32)
    # A comparison and not a gather: it fuses, and a vocabulary split over devices stays split.
    vocabulary = jax.lax.broadcasted_iota(targets_BC.dtype, logits_BCV.shape, 2)
    hit_BCV = vocabulary == targets_BC[..., None]
    picked_BC = jnp.sum(jnp.where(hit_BCV, logits_BCV, 0.0), axis=-1)
    return picked_BC - jax.nn.logsumexp(logits_BCV, axis=-1)


def _number_of_chunks(tokens: int, shape: tuple[int, ...]) -> int:
    """Chunks of at most `tokens` tokens (at least one position of every row); 0 = one chunk."""
    rows, length = shape[:2]
    return -(-length // max(tokens // rows, 1)) if tokens else 1


def _split(x_BL, chunks):
    """[B, L, ...] -> [N, B, C, ...], zeros behind the last position where N does not divide L."""
    rows, length, *rest = x_BL.shape
    short = -length % chunks
    x_BL = jnp.pad(x_BL, [(0, 0), (0, short)] + [(0, 0)] * len(rest)) if short else x_BL
    return jnp.moveaxis(x_BL.reshape(rows, -1, chunks, *rest), 2, 0)


def _join(x_NBC, length):
    """The inverse of `_split`, for [N, B, C]."""
    return jnp.moveaxis(x_NBC, 0, 2).reshape(x_NBC.shape[1], -1)[:, :length]

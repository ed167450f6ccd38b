"""The log-probability a model gives to a batch's targets, never holding the logits of all of it.

B rows, L positions, D width, V vocabulary; N chunks of C positions of every row, N * C >= L.

A chunk takes every N-th position, not a run of them: an array whose rows or positions are split
over devices stays split that way, and making the chunks moves no data between devices.

`summed_nll` goes further than rematerialisation: when differentiated it takes the gradient of each
chunk while the chunk's logits exist, so these are computed once and not twice. That gradient can
not be differentiated again; `token_logprobs` has no such limit.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm import sharding
from jaxlm.contract import LM, Batch, Params


def token_logprobs(
    lm: LM, params: Params, batch: Batch, key: jax.Array | None = None
) -> tuple[jax.Array, Any, dict[str, jax.Array]]:
    """log p(target) in nats at every position, [B, L] float32; then the model's taps and penalties.

    Logits of about `lm.chunk` tokens exist at a time, in the backward pass too.
    """
    hidden_BLD, taps, penalties = lm.hidden(params, batch, key)
    chunks = _number_of_chunks(lm.chunk, hidden_BLD.shape)
    if chunks == 1:
        with jax.named_scope("loss"):
            logprobs_BL = logprobs(lm.unembed(params, hidden_BLD), batch["targets"])
        return logprobs_BL, taps, penalties
    hidden_NBCD, targets_NBC = (_split(x, chunks) for x in (hidden_BLD, batch["targets"]))
    parts = _parts(targets_NBC.shape)
    unembed, head = _unembed(lm, params, hidden_NBCD, parts)

    def score(head, hidden_BCD, targets_BC):
        return logprobs(unembed(hidden_BCD, *head), targets_BC)

    # A scan keeps the two passes apart anyway.
    score = jax.checkpoint(_each(parts, score), prevent_cse=False)
    with jax.named_scope("loss"):
        head = _for_each(parts, head)
        xs = _cut(parts, hidden_NBCD), _cut(parts, targets_NBC)
        _, logprobs_NBC = jax.lax.scan(lambda _, x: (None, score(head, *x)), None, xs)
    return _join(_uncut(parts, logprobs_NBC), hidden_BLD.shape[1]), taps, penalties


def summed_nll(
    lm: LM, params: Params, batch: Batch, key: jax.Array | None = None
) -> tuple[jax.Array, Any, dict[str, jax.Array]]:
    """Sum over tokens of -weight * log p(target) in nats, [] float32; then taps and penalties."""
    hidden_BLD, taps, penalties = lm.hidden(params, batch, key)
    chunks = _number_of_chunks(lm.chunk, hidden_BLD.shape)
    hidden_NBCD, targets_NBC, weights_NBC = (
        _split(x, chunks) for x in (hidden_BLD, batch["targets"], batch["weights"])
    )
    parts = _parts(targets_NBC.shape)
    unembed, head = _unembed(lm, params, hidden_NBCD, parts)
    xs = (_cut(parts, x) for x in (hidden_NBCD, weights_NBC, targets_NBC))
    with jax.named_scope("loss"):
        nll: jax.Array = _summed_nll((unembed, parts), _for_each(parts, head), *xs)
        return jnp.sum(nll), taps, penalties


def logprobs(logits_BCV: jax.Array, targets_BC: jax.Array) -> jax.Array:
    """The logits' log-softmax at the targets, float32, whatever the logits' type."""
    logits_BCV = logits_BCV.astype(jnp.float32)
    # A comparison and not a gather: it fuses, and a vocabulary split over devices stays split.
    vocabulary = jax.lax.broadcasted_iota(targets_BC.dtype, logits_BCV.shape, 2)
    hit_BCV = vocabulary == targets_BC[..., None]
    picked_BC = jnp.sum(jnp.where(hit_BCV, logits_BCV, 0.0), axis=-1)
    return picked_BC - jax.nn.logsumexp(logits_BCV, axis=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed_nll(static, head, hidden_NBCD, weights_NBC, targets_NBC):
    """The sum, or that of each part."""
    nll, parts = _nll(static)
    add = lambda total, chunk: (total + nll(head, *chunk), None)
    zero = jnp.zeros(parts, jnp.float32)
    return jax.lax.scan(add, zero, (hidden_NBCD, weights_NBC, targets_NBC))[0]


def _forward(static, head, hidden_NBCD, weights_NBC, targets_NBC):
    """The sum, and all gradients for a cotangent of one."""
    nll, parts = _nll(static)

    def add(carry, chunk):
        total, d_head = carry
        hidden_BCD, weights_BC, targets_BC = chunk
        # Parts do not touch each other, so the gradient of their sum is that of each.
        of_floats = lambda head, hidden, weights: nll(head, hidden, weights, targets_BC)
        value, pull = jax.vjp(of_floats, head, hidden_BCD, weights_BC)
        d_here, *d_chunk = pull(jnp.ones(parts, jnp.float32))
        return (total + value, jax.tree.map(jnp.add, d_head, d_here)), d_chunk

    zeros = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), head)
    carry = jnp.zeros(parts, jnp.float32), zeros
    (total, d_head), d_chunks = jax.lax.scan(add, carry, (hidden_NBCD, weights_NBC, targets_NBC))
    d_head = jax.tree.map(lambda d, p: d.astype(p.dtype), d_head, head)
    return total, (d_head, *d_chunks)


def _backward(static, gradients, cotangent):
    del static
    d_head, *d_chunks = gradients

    def scaled(gradient, before):
        after = gradient.ndim - before - cotangent.ndim
        by = cotangent.reshape((1,) * before + cotangent.shape + (1,) * after)
        return (gradient * by).astype(gradient.dtype)

    d_head = jax.tree.map(lambda g: scaled(g, 0), d_head)
    return d_head, *(scaled(g, 1) for g in d_chunks), None  # targets are integers


_summed_nll.defvjp(_forward, _backward)


def _nll(static):
    unembed, parts = static

    def nll(head, hidden_BCD, weights_BC, targets_BC):
        logprobs_BC = logprobs(unembed(hidden_BCD, *head), targets_BC)
        return -jnp.sum(weights_BC * logprobs_BC)

    return _each(parts, nll), parts


def _unembed(lm, params, hidden_NBCD, parts):
    """(hidden, *head) -> logits of a part of a chunk, and the arrays that the head reads.

    They become arguments, they and no others: their gradients are accumulated over the chunks.
    """
    logits = lm.head(params) if lm.head else functools.partial(lm.unembed, params)
    hidden_BCD = hidden_NBCD[0]
    if parts:
        shape = jax.eval_shape(lambda x: _cut(parts, x), hidden_NBCD).shape[1 + len(parts) :]
        hidden_BCD = jax.ShapeDtypeStruct(shape, hidden_NBCD.dtype)
    return jax.closure_convert(logits, hidden_BCD)


# Where a chunk's tokens lie on several devices, each adds up the head's gradient over its own part
# of every chunk, and the parts are summed once, in the end. As one array, devices would exchange it
# at every chunk.


def _parts(shape_NBC):
    """Devices that rows and positions of a chunk are split over; () = not split into parts."""
    _, rows, positions = shape_NBC
    parts = sharding.ways("batch"), sharding.ways("length")
    mesh = jax.sharding.get_abstract_mesh()
    fits = rows % parts[0] == 0 and positions % parts[1] == 0
    return parts if math.prod(parts) > 1 and fits and not mesh.are_all_axes_explicit else ()


def _each(parts, fn):
    """`fn` of each part apart, vectorized."""
    return jax.vmap(jax.vmap(fn)) if parts else fn


def _for_each(parts, head):
    """The head's arrays, one for each part: no copies, as each part has its device."""
    if not parts:
        return head
    free = jax.sharding.PartitionSpec.UNCONSTRAINED
    spec = sharding.spec_of("batch", "length")

    def one(x):
        spread = jnp.broadcast_to(x, (*parts, *x.shape))
        return jax.lax.with_sharding_constraint(
            spread, jax.sharding.PartitionSpec(*spec, *[free] * x.ndim)
        )

    return jax.tree.map(one, head)


def _cut(parts, x_NBC):
    """[N, B, C, ...] -> [N, parts of B, parts of C, B, C, ...]."""
    if not parts:
        return x_NBC
    chunks, rows, positions, *rest = x_NBC.shape
    by_rows, by_positions = parts
    cut = chunks, by_rows, rows // by_rows, by_positions, positions // by_positions
    return x_NBC.reshape(*cut, *rest).swapaxes(2, 3)


def _uncut(parts, x_NBC):
    """The inverse of `_cut`."""
    if not parts:
        return x_NBC
    chunks, by_rows, by_positions, rows, positions = x_NBC.shape
    return x_NBC.swapaxes(2, 3).reshape(chunks, by_rows * rows, by_positions * positions)


def _number_of_chunks(tokens: int, shape: tuple[int, ...]) -> int:
    """Chunks of at most `tokens` tokens of a device (at least one position of every row); 0 = one.

    Of a device, so that a recipe does as well on one as on many.
    """
    rows, length = (
        max(size // sharding.ways(axis), 1)
        for size, axis in zip(shape[:2], ("batch", "length"), strict=True)
    )
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

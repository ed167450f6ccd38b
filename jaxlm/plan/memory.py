"""Bytes on one device by kind: those of the state from its shardings, the rest from its shapes.

Reckoned is what a device has to hold at the moment when most is held: the gradients, what the
forward pass stored for the backward pass, and the working set of one block (or of one chunk of the
loss). What a pass stores is read off the traced program: the residuals of its derivative, for the
share of the model and of the batch that lies on one device. The compiler's own figure, where there
is one, is the better one; this one takes a second, ranks alternatives, and names what is large.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlm import sharding
from jaxlm.build import Built
from jaxlm.models.options import ACTIVATIONS, DecoderConfig, resolve
from jaxlm.models.transformer import decoder
from jaxlm.specs import Run

BACKWARD = 1.5  # what a computation holds with its gradients, to what it holds without them


class Memory(NamedTuple):
    """Bytes on one device, and in its host's memory."""

    parameters: float
    optimizer: float
    extras: float
    gradients: float
    activations: float  # stored from the forward to the backward pass
    working: float  # of one block or one chunk of the loss, while it is computed
    host: float = 0.0  # of the state, for this device; on none

    @property
    def total(self) -> float:
        """On the device: in the backward pass, or where moments of the host are at hand."""
        return sum(self) - self.host

    @property
    def state(self) -> float:
        return self.parameters + self.optimizer + self.extras


def on_one_device(tree) -> float:
    """Bytes of a tree of shapes with shardings, in the device's own memory."""
    return _bytes(tree, host=False)


def on_its_host(tree) -> float:
    """Bytes of a tree of shapes with shardings that lie in the host's memory for one device."""
    return _bytes(tree, host=True)


def _bytes(tree, host):
    size = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    there = lambda x: (x.sharding.memory_kind == sharding.HOST) == host
    return float(sum(size(x) for x in jax.tree.leaves(tree) if there(x)))


def reckon(built: Built, kernel: bool | None = None) -> Memory:
    """The memory that a run's step takes on each of its devices; `kernel`: see `flash`."""
    kernel = flash(built) if kernel is None else kernel
    run, sizes, state = built.run, dict(built.mesh.shape), built.abstract
    parameters = on_one_device(state.params)
    model, rows, length = share_of_one(run, sizes)
    ways = sizes["fsdp"] * sizes["tensor"]
    # Sums of gradients lie next to the gradients of the micro-batch at hand.
    each = _itemsize(run.optimizer.gradient_dtype or "float32")
    sums = each * sum(x.size for x in jax.tree.leaves(state.params)) / ways
    kept = stored_with_weights(model, rows, length, sizes["fsdp"], kernel)
    return Memory(
        parameters,
        on_one_device(state.opt_state),
        on_one_device(state.extras),
        parameters + (sums if run.accumulate > 1 else 0.0),
        kept,
        working(model, rows, length, sizes["fsdp"], kernel),
        on_its_host(state.opt_state),
    )


def passes(model: DecoderConfig, rows: int, length: int, fsdp: int, flash: bool) -> float:
    """Bytes that the forward and backward pass hold next to the state and the gradients."""
    kept = stored_with_weights(model, rows, length, fsdp, flash)
    return kept + working(model, rows, length, fsdp, flash)


def stored_with_weights(model, rows, length, fsdp, flash) -> float:
    """`stored`, and the gathered weights where nothing of a block is computed again."""
    whole = model.remat == "none" and fsdp > 1
    return stored(model, rows, length, flash) + whole * model.layers * _gathered(model)


def working(model, rows, length, fsdp, flash) -> float:
    """Bytes of the larger of two: a block's backward pass, and a chunk of the loss."""
    block = _block(model, rows, length, flash)
    if model.experts_over:  # gradients of its kernels
        block += 4 * feed_forward(model)
    if model.experts_over == "fsdp":  # the tokens of all devices, their cotangent and gradient
        block += fsdp * rows * length * model.width * (2 * _itemsize(model.dtype) + 4)
    return max(block, _loss(model, rows, length))


def share_of_one(run: Run, sizes: dict[str, int]) -> tuple[DecoderConfig, int, int]:
    """What one device computes of the model, as a model; its rows and positions at a time."""
    model, tensor = resolve(run.model, "cpu"), sizes["tensor"]
    cut = lambda n: n // tensor if n % tensor == 0 else n
    whole = model.experts_over == "tensor"
    model = dataclasses.replace(
        model,
        heads=cut(model.heads),
        # Of key heads that `tensor` does not divide a device has all, and uses those of its heads.
        kv_heads=math.gcd(cut(model.kv_heads), cut(model.heads)),
        ffn_width=model.ffn_width if whole else cut(model.ffn_width),
        vocabulary=cut(model.vocabulary),
        attention="xla",
        scan_layers="on",
    )
    if model.experts_over:
        here = max(model.experts // sizes[model.experts_over], 1)
        chosen = min(model.experts_per_token, here)
        model = dataclasses.replace(model, experts=here, experts_per_token=chosen)
    rows = run.rows * run.members // (sizes["data"] * sizes["fsdp"] * run.accumulate)
    return model, max(rows, 1), run.data.length // sizes["sequence"]


def flash(built: Built) -> bool:
    """Whether attention runs without ever holding the scores of all pairs."""
    platform = sharding.platform(built.mesh)
    packed = not built.run.data.attend_across_documents
    sequence = built.mesh.shape["sequence"]
    model = resolve(built.run.model, platform, packed=packed, sequence=sequence)
    several_cpus = platform == "cpu" and built.mesh.size > 1
    return model.attention != "xla" and not (model.attention == "cpu_blocks" and several_cpus)


@functools.lru_cache(maxsize=256)
def stored(model: DecoderConfig, rows: int, length: int, flash: bool) -> float:
    """Bytes that a model's forward pass leaves for its backward pass, but for its weights."""
    lm = decoder(model, "cpu")
    params = jax.eval_shape(lm.init, jax.random.key(0))
    hidden = lambda params: jnp.sum(lm.hidden(params, _batch(rows, length))[0])
    residuals = jax.eval_shape(lambda params: jax.vjp(hidden, params)[1], params)
    weights = {(x.shape, x.dtype) for x in jax.tree.leaves(params)}
    found = (x for x in jax.tree.leaves(residuals) if (x.shape, x.dtype) not in weights)
    # Scores are [rows, kv heads, query heads of each, length, length], their mask boolean.
    scores = lambda x: (x.ndim >= 5 and x.shape[-2:] == (length, length)) or x.dtype == bool
    return float(sum(x.size * x.dtype.itemsize for x in found if not (flash and scores(x))))


def _block(model, rows, length, flash):
    """The working set of a block's backward pass: all that it could store, its weights whole."""
    of = lambda layers: stored(
        dataclasses.replace(model, remat="none", layers=layers), rows, length, flash
    )
    return BACKWARD * (of(2) - of(1)) + _gathered(model)


def _loss(model, rows, length):
    """The logits of a chunk and their gradient; the head whole, and its gradient in float32."""
    tokens = rows * length
    chunk = min(model.loss_chunk or tokens, tokens)
    head = model.width * model.vocabulary
    return BACKWARD * 4 * chunk * model.vocabulary + head * (_itemsize(model.dtype) + 4)


def _gathered(model):
    """Bytes of one block's kernels in the dtype of the products."""
    return block_kernels(model) * _itemsize(model.dtype)


def block_kernels(model: DecoderConfig) -> int:
    """Numbers in the kernels of one block of a resolved model."""
    inner, keys = model.heads * model.head_width, model.kv_heads * model.head_width
    return model.width * (2 * inner + 2 * keys + model.experts) + feed_forward(model)


def feed_forward(model: DecoderConfig) -> int:
    """The same of its feed-forward alone, or of all its experts without their router."""
    kernels = 3 if ACTIVATIONS[model.activation][1] else 2
    return kernels * max(model.experts, 1) * model.width * model.ffn_width


def _itemsize(dtype):
    return jnp.dtype(dtype).itemsize


def _batch(rows, length):
    ids = jnp.zeros((rows, length), jnp.int32)
    return {"tokens": ids, "segments": ids, "positions": ids}

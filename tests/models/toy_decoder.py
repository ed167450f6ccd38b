"""A toy decoder and its batches, shared by the tests of the models and compiled once each."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.models.transformer import DecoderConfig, decoder, stack_layers, unstack_layers

VOCABULARY = 61


def toy(**options) -> DecoderConfig:
    shape = {"vocabulary": VOCABULARY, "width": 32, "layers": 2, "heads": 4, "kv_heads": 2}
    return DecoderConfig(**{**shape, **options})


@functools.cache
def build(config: DecoderConfig, sequence=1):
    """LM, its initial params, and jitted (params, batch) -> logits."""
    lm = decoder(config, "cpu", sequence=sequence)
    logits = jax.jit(lambda params, batch: lm.unembed(params, lm.hidden(params, batch)[0]))
    return lm, jax.jit(lm.init)(jax.random.key(0)), logits


def shaken(params):
    """The params with noise on each, so that no bias is 0 and no scale is 1.

    Layers get the same noise, stacked or not.
    """
    scanned = "0" not in params["blocks"]
    rng = np.random.default_rng(0)
    noisy = jax.tree.map(
        lambda p: p + 0.2 * rng.standard_normal(p.shape, np.float32), stack_layers(params)
    )
    return noisy if scanned else unstack_layers(noisy)


def loss_of(lm):
    """(params, batch) -> summed negative log-likelihood of the targets and penalties; the taps."""

    def loss(params, batch):
        hidden, taps, penalties = lm.hidden(params, batch)
        logprobs = jax.nn.log_softmax(lm.unembed(params, hidden))
        hit = jax.nn.one_hot(batch["targets"], logprobs.shape[-1], dtype=bool)
        real = (batch["segments"] > 0)[..., None]
        return sum(penalties.values(), -jnp.sum(jnp.where(hit & real, logprobs, 0.0))), taps

    return loss


def pack(*rows, length=12):
    """A batch of rows of documents of tokens, padded with zeros on the right.

    A document that is None stands for one token of padding.
    """
    batch = {
        name: np.zeros((len(rows), length), np.int32)
        for name in ("tokens", "targets", "segments", "positions")
    }
    for b, documents in enumerate(rows):
        start = 0
        for segment, document in enumerate(documents, 1):
            here = b, slice(start, start + (1 if document is None else len(document)))
            start = here[1].stop
            if document is not None:
                batch["tokens"][here] = document
                batch["targets"][here] = np.roll(document, -1)
                batch["segments"][here] = segment
                batch["positions"][here] = np.arange(len(document))
    return {name: jnp.asarray(array) for name, array in batch.items()}


def document(length, seed=0):
    return np.random.default_rng(seed).integers(1, VOCABULARY, length)


def two_rows():
    """Two packed documents with padding, and one that fills its row."""
    return pack([document(4), document(6, 1)], [document(12, 2)])

"""A small decoder that generates, with letters for tokens, and what it writes without a cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.generate.engine import Generator, Request
from jaxlm.generate.sampling import Sampling
from jaxlm.models.transformer import DecoderConfig, decoder

VOCABULARY = 61
GREEDY = Sampling(temperature=0)


def letters(ids) -> str:
    """Tokens as letters; token 60 leaves no trace, as special tokens do."""
    return "".join(chr(ord("0") + token) for token in ids if token != 60)


@functools.cache
def model(**options):
    """LM and its params, sharpened so that no two tokens are nearly as likely."""
    shape = {"vocabulary": VOCABULARY, "width": 32, "layers": 2, "heads": 4, "kv_heads": 2}
    lm = decoder(DecoderConfig(**{**shape, "init_scale": 2.0, **options}), "cpu")
    return lm, jax.jit(lm.init)(jax.random.key(1))


@functools.cache
def generator(context=64, ends=(), rows=4, **options) -> Generator:
    return Generator(model(**options)[0], context, letters, ends, rows=rows)


@functools.cache
def _logprobs(length, **options):
    lm, _ = model(**options)

    @jax.jit
    def logprobs(params, tokens_L, count):
        place_L = jnp.arange(length)
        batch = {
            "tokens": tokens_L[None],
            "segments": (place_L < count).astype(jnp.int32)[None],
            "positions": place_L[None],
        }
        logits_BLV = lm.unembed(params, lm.hidden(params, batch)[0])
        return jax.nn.log_softmax(logits_BLV[0, count - 1])

    return logprobs


def plain(ids, tokens, **options):
    """Greedy tokens and their scores, the whole text read again for each, without a cache."""
    _, params = model(**options)
    ids, scores, start = list(ids), [], len(ids)
    for _ in range(tokens):
        padded = np.pad(np.asarray(ids, np.int32), (0, 64 - len(ids)))
        logprobs_V = np.asarray(_logprobs(64, **options)(params, padded, len(ids)))
        ids.append(int(logprobs_V.argmax()))
        scores.append(float(logprobs_V.max()))
    return ids[start:], scores


def prompt(length, seed=0):
    return np.random.default_rng(seed).integers(1, VOCABULARY - 1, length).tolist()


def requests(*lengths, tokens=12, **fields) -> list[Request]:
    return [Request(prompt(n, i), tokens, **fields) for i, n in enumerate(lengths)]

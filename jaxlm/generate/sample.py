"""Plain sampling: the whole window is read again for each new token. Slow, and hard to get wrong.

L window length, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.contract import LM


def make_sampler(lm: LM, length: int, *, temperature: float = 1.0, top_k: int = 0):
    """Returns `sample(params, ids, tokens, seed, stop=None) -> new ids`, compiled once.

    `ids` is the prompt, with its bos; at most the last `length` ids are read, so that a long text
    slides through the window. Temperature 0 takes the likeliest token; `top_k` 0 keeps all.
    Sampling ends after `tokens` new ids or at the id `stop`; with 0 tokens it only compiles.
    """
    mesh = jax.sharding.get_mesh()
    whole = None if mesh.empty else jax.NamedSharding(mesh, jax.P())  # for every process to read

    @functools.partial(jax.jit, out_shardings=whole)
    def next_id(params, window_L, used, key):
        place = jnp.arange(length)
        batch = {
            "tokens": window_L[None],
            "segments": (place < used).astype(jnp.int32)[None],
            "positions": place[None],
        }
        hidden_BLD, _, _ = lm.hidden(params, batch)
        logits_V = lm.unembed(params, hidden_BLD[0, used - 1]).astype(jnp.float32)
        if top_k:
            floor = jax.lax.top_k(logits_V, min(top_k, logits_V.size))[0][-1]
            logits_V = jnp.where(logits_V >= floor, logits_V, -jnp.inf)
        if temperature == 0:
            return jnp.argmax(logits_V)
        return jax.random.categorical(key, logits_V / temperature)

    def sample(params, ids, tokens, seed, stop=None):
        ids, start = list(ids), len(ids)
        keys = jax.random.split(jax.random.key(seed), max(tokens, 1))

        def inputs(key):
            window = ids[-length:]
            padded = np.pad(np.asarray(window, np.int32), (0, length - len(window)))
            return params, padded, len(window), key

        if not tokens:
            next_id.lower(*inputs(keys[0])).compile()
        for key in keys[:tokens]:
            new = int(next_id(*inputs(key)))
            if new == stop:
                break
            ids.append(new)
        return ids[start:]

    return sample

"""Causal attention within packed documents, behind one function.

Letters: B batch, L query length, M key length, H query heads, G key/value heads, R query heads per
key/value head (H = G·R), K head width.

A query sees the keys of its own document that do not come later, and with a window w only the last
w of them. Segment 0 is padding: what its positions return is finite and otherwise unspecified.
Scores and softmax are float32; the products run in the dtype of the operands. A backend is a
function in `BACKENDS`; the tests ask the same of every one that `usable` names.
"""

import difflib
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxlm.models.attention_cpu import cpu_blocks
from jaxlm.models.masks import MASKED, visible


def attention(
    query_BLHK: jax.Array,
    key_BMGK: jax.Array,
    value_BMGK: jax.Array,
    *,
    segments_BL: jax.Array,
    positions_BL: jax.Array,
    window: int = 0,
    soft_cap: float = 0.0,
    backend: str = "xla",
) -> jax.Array:
    """Weighted values, [B, L, H, K], in the dtype of the query.

    `window` 0 sees the whole document. `soft_cap` c > 0 turns a score s into c·tanh(s/c), before
    the mask (Gemma 2, arXiv 2408.00118). `backend` is a name that `resolve` returned.
    """
    if backend == "cpu_blocks" and jax.sharding.get_abstract_mesh().size > 1:
        backend = "xla"  # several CPU devices rehearse accelerators, so they take the same path
    return BACKENDS[backend](
        query_BLHK,
        key_BMGK,
        value_BMGK,
        segments_BL=segments_BL,
        positions_BL=positions_BL,
        window=window,
        soft_cap=soft_cap,
    )


def resolve(name: str, platform: str) -> str:
    """The backend that `name` means on a platform. Raises `ValueError` for an unknown one."""
    names = usable(platform)
    if name == "auto":
        return names[0]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"config.model.attention is {name!r}, but on {platform} it can be 'auto' or one of "
            f"{', '.join(map(repr, names))}{hint}"
        )
    return name


def usable(platform: str) -> tuple[str, ...]:
    """Names of the backends that run on a platform, the preferred one first."""
    return ("cpu_blocks", "xla") if platform == "cpu" else ("xla",)


def xla(query_BLHK, key_BMGK, value_BMGK, *, segments_BL, positions_BL, window, soft_cap):
    """Plain einsums, the reference of every other backend. Holds [B, H, L, M] scores."""
    B, L, H, K = query_BLHK.shape
    G = key_BMGK.shape[2]
    query_BLGRK = query_BLHK.reshape(B, L, G, H // G, K)
    scores_BGRLM = jnp.einsum(
        "BLGRK,BMGK->BGRLM", query_BLGRK, key_BMGK, preferred_element_type=jnp.float32
    )
    scores_BGRLM *= K**-0.5
    if soft_cap:
        scores_BGRLM = soft_cap * jnp.tanh(scores_BGRLM / soft_cap)
    seen_BLM = visible(segments_BL, positions_BL, window)
    scores_BGRLM = jnp.where(seen_BLM[:, None, None], scores_BGRLM, MASKED)
    weights_BGRLM = jax.nn.softmax(scores_BGRLM, axis=-1).astype(value_BMGK.dtype)
    out_BLGRK = jnp.einsum("BGRLM,BMGK->BLGRK", weights_BGRLM, value_BMGK)
    return out_BLGRK.reshape(B, L, H, K)


BACKENDS: dict[str, Callable[..., jax.Array]] = {"xla": xla, "cpu_blocks": cpu_blocks}

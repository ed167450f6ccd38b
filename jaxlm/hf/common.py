"""What the config.json of most families have in common."""

from typing import Any

from jaxlm.hf import rope
from jaxlm.hf.keys import shown
from jaxlm.models.options import DecoderConfig

Json = dict[str, Any]

# Nonlinearity in config.json -> the feed-forward's form here, with a gate and without.
GATED = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu"}
PLAIN = {
    "gelu": "gelu_exact",
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_fast": "gelu",
}

SHAPE_KEYS = frozenset(
    {
        *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "intermediate_size", "hidden_act", "rms_norm_eps"),
        *("tie_word_embeddings", *rope.KEYS),
    }
)


def shape(hf: Json, *, theta: float = 10000.0, tied: bool = False, eps: float = 1e-6) -> Json:
    """Options from the keys in `SHAPE_KEYS`; `theta`, `tied`, `eps`: where config.json is silent.

    Raises `ValueError` if a size is missing, or not divisible as it has to be.
    """
    heads = number(hf, "num_attention_heads")
    if hf.get("num_key_value_heads"):
        share(hf, "num_attention_heads", "num_key_value_heads")
    return {
        "vocabulary": number(hf, "vocab_size"),
        "width": number(hf, "hidden_size"),
        "layers": number(hf, "num_hidden_layers"),
        "heads": heads,
        "kv_heads": hf.get("num_key_value_heads") or heads,
        "head_width": hf.get("head_dim") or share(hf, "hidden_size", "num_attention_heads"),
        "ffn_width": number(hf, "intermediate_size"),
        "activation": activation(hf, "hidden_act", "silu", GATED),
        "norm_eps": float(hf.get("rms_norm_eps", eps)),
        "tied": hf.get("tie_word_embeddings", tied),
        **rope.options(hf, theta),
    }


def config(c: DecoderConfig, architecture: str, model_type: str) -> Json:
    """The same keys from options, resolved or not."""
    heads = c.heads
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": c.vocabulary,
        "hidden_size": c.width,
        "num_hidden_layers": c.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": c.kv_heads or heads,
        "head_dim": c.head_width or c.width // heads,
        "intermediate_size": c.ffn_width,
        "hidden_act": named(c.activation, GATED, "silu"),
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tied,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        **rope.config(c.rope_theta, c.rope_scaling),
    }


def number(hf: Json, key: str) -> int:
    """A size of the model. Raises `ValueError` if config.json does not state it."""
    if hf.get(key) is None:
        raise ValueError(f"config.json does not say {key}, a size that the model has to have")
    return hf[key]


def share(hf: Json, whole: str, by: str) -> int:
    """A size divided by a number of heads. Raises `ValueError` if it is not divisible."""
    size, heads = number(hf, whole), number(hf, by)
    if size % heads:
        raise ValueError(f"config.json says {by}={heads}, which does not divide {whole}={size}")
    return size // heads


def activation(hf: Json, key: str, usual: str, known: dict[str, str]) -> str:
    """The feed-forward's form; `usual`: where config.json is silent."""
    name = hf.get(key, usual)
    if name not in known:
        raise ValueError(
            f"config.json says {key}={shown(name)}, a nonlinearity that is not known here; known "
            f"are {', '.join(known)}"
        )
    return known[name]


def named(ours: str, known: dict[str, str], usual: str) -> str:
    """The first of their names for ours."""
    return next((theirs for theirs, name in known.items() if name == ours), usual)


def refuse(hf: Json, **usual: Any) -> None:
    """Raises `ValueError` if config.json sets one of these keys to something else."""
    for key, value in usual.items():
        if hf.get(key, value) not in (value, None):
            raise ValueError(
                f"config.json says {key}={shown(hf[key])}, which is not supported: only "
                f"{shown(value)} is"
            )

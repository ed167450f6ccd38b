"""Tiny Hugging Face models of each family, and weights for them that need no file.

The same cases serve the tests without torch, the tool that makes their fixtures, and the live
comparison with torch. Weights follow from the names of their tensors.
"""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.hf import tensors

Json = dict[str, Any]

VOCABULARY = 61  # no mesh divides it

_LLAMA: Json = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _llama(**options: Any) -> Json:
    return {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **_LLAMA, **options}


def _other(kind: str, architecture: str, **options: Any) -> Json:
    return _LLAMA | {"model_type": kind, "architectures": [architecture], **options}


_NEOX: Json = {
    "model_type": "gpt_neox",
    "architectures": ["GPTNeoXForCausalLM"],
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "hidden_act": "gelu",
    "rotary_pct": 0.25,
    "rotary_emb_base": 10000,
    "max_position_embeddings": 64,
    "layer_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
_GPT2: Json = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}


_GEMMA: Json = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 12,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 20,
    "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 3.0,
    "sliding_window": 7,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "pad_token_id": None,
}
_GEMMA3: Json = {
    "model_type": "gemma3_text",
    "architectures": ["Gemma3ForCausalLM"],
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "sliding_window_pattern": 3,
}


def _rope(kind: str, **numbers: Any) -> Json:
    """In the form of transformers 5."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **numbers}}


_YARN: Json = {"factor": 4.0, "original_max_position_embeddings": 16}

# Name of a case -> config.json, in the older form or that of transformers 5. Texts have up to 40
# tokens (`texts`), so that they reach beyond every window and every length before stretching.
CASES: dict[str, Json] = {
    "llama": _llama(),
    "llama, tied, one KV head": _llama(tie_word_embeddings=True, num_key_value_heads=1),
    "llama, wide heads, all biases": _llama(head_dim=12, attention_bias=True, mlp_bias=True),
    "llama, biases of attention": _llama(attention_bias=True),
    "llama 3.1": _llama(
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        rope_theta=500.0,
    ),
    "llama, linear": _llama(rope_scaling={"type": "linear", "factor": 4.0}),
    "llama, dynamic": _llama(**_rope("dynamic", factor=2.0), max_position_embeddings=16),
    "llama, yarn": _llama(**_rope("yarn", **_YARN)),
    "llama, yarn with all numbers": _llama(
        **_rope("yarn", **_YARN, beta_fast=16, beta_slow=2, mscale=0.7, mscale_all_dim=1.2)
    ),
    "mistral": _other("mistral", "MistralForCausalLM", sliding_window=7),
    "qwen2": _other("qwen2", "Qwen2ForCausalLM", tie_word_embeddings=True),
    "qwen2, window from a layer on": _other(
        "qwen2",
        "Qwen2ForCausalLM",
        use_sliding_window=True,
        sliding_window=7,
        max_window_layers=1,
    ),
    "qwen3": _other("qwen3", "Qwen3ForCausalLM", head_dim=12, rope_theta=1e6),
    "mixtral": _other(
        "mixtral",
        "MixtralForCausalLM",
        num_local_experts=4,
        num_experts_per_tok=2,
        router_aux_loss_coef=0.0,
        rope_theta=1e6,
    ),
    "olmo2": _other("olmo2", "Olmo2ForCausalLM", pad_token_id=None),
    "gemma2": _GEMMA | {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]},
    "gemma3": _GEMMA | _GEMMA3 | {"rope_theta": 1e6, "rope_local_base_freq": 1e4},
    "gemma3, in the form of transformers 5": _GEMMA
    | _GEMMA3
    | {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
        },
        "layer_types": ["full_attention", *["sliding_attention"] * 2],
    },
    # As published: the text model says what is unusual in it, in the older form.
    "gemma3, with a tower for images": {
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": 58,
        "eoi_token_index": 59,
        "image_token_index": 60,
        "mm_tokens_per_image": 4,
        "eos_token_id": [1, 6],
        "initializer_range": 0.02,
        "text_config": {
            "model_type": "gemma3_text",
            **{key: _GEMMA[key] for key in ("vocab_size", "hidden_size", "intermediate_size")},
            "num_hidden_layers": 6,
            "num_key_value_heads": 1,
            "head_dim": 6,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 7,
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
    },
    "gpt_neox": _NEOX,
    "gpt_neox, one after the other": _NEOX
    | {"use_parallel_residual": False, "tie_word_embeddings": True, "rotary_pct": 1.0},
    "gpt2": _GPT2,
    "gpt2, wide": _GPT2 | {"n_inner": 40, "activation_function": "gelu", "n_head": 2},
}


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The weights of a tensor, float32, from its name: scales of norms near 1, the rest near 0."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    noise = rng.standard_normal(shape, np.float32)
    is_scale = ("norm" in name or "ln_" in name) and name.endswith("weight")
    # Gemma's scales are stored less one; near 1 they do as well.
    return 1 + 0.2 * noise if is_scale else 0.2 * noise


def texts(vocabulary: int = VOCABULARY) -> list[np.ndarray]:
    """Tokens of some documents, by length: torch's dynamic RoPE remembers the longest one."""
    rng = np.random.default_rng(0)
    return [rng.integers(1, vocabulary, length) for length in (9, 23, 40)]


def save(folder: Path, config: Json, shapes: dict[str, tuple[int, ...]], shard_bytes=10**9) -> None:
    """A Hugging Face folder with drawn weights."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    layout = {name: (shape, np.dtype(np.float32)) for name, shape in shapes.items()}
    with tensors.Writer(folder, layout, shard_bytes) as writer:
        for name, (shape, _) in layout.items():
            writer.put(name, draw(name, shape))

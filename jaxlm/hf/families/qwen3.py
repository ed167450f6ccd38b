"""Qwen 3: a Llama that normalises queries and keys head by head."""

from jaxlm.hf import common
from jaxlm.hf.families import llama, qwen2
from jaxlm.hf.family import Family, Json
from jaxlm.hf.links import linked
from jaxlm.models.options import DecoderConfig

NAMES = llama.NAMES | {
    "attention/query_norm": "self_attn.q_norm",
    "attention/key_norm": "self_attn.k_norm",
}


def options(hf: Json) -> Json:
    hf = {"head_dim": 128, **hf}
    biases = {"attention_bias": bool(hf.get("attention_bias", False))}
    return common.shape(hf) | qwen2.window(hf) | biases | {"qk_norm": True}


def config(c: DecoderConfig) -> Json:
    plain = common.config(c, FAMILY.architecture, FAMILY.model_type)
    return plain | qwen2.window_config(c) | {"attention_bias": c.attention_bias}


def links(paths, config, there=()):
    return linked(paths, NAMES, layer=llama.LAYER)


FAMILY = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    "model.",
    options,
    config,
    links,
    common.SHAPE_KEYS | qwen2.WINDOW_KEYS | {"attention_bias"},
)

"""Llama 2, 3, 3.1 and later, and what took over its form: OpenLLaMA, TinyLlama, SmolLM."""

from jaxlm.hf import common
from jaxlm.hf.family import Family, Json
from jaxlm.hf.links import linked
from jaxlm.models.options import DecoderConfig

LAYER = "model.layers.{}."
NAMES = {
    "embed": "model.embed_tokens",
    "final_norm": "model.norm",
    "head": "lm_head",
    "attention_norm": "input_layernorm",
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/output": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
}
ROTARY = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"  # a table that older files hold


def options(hf: Json) -> Json:
    return common.shape(hf) | {
        key: bool(hf.get(key, False)) for key in ("attention_bias", "mlp_bias")
    }


def config(c: DecoderConfig) -> Json:
    biases = {"attention_bias": c.bias or c.attention_bias, "mlp_bias": c.bias or c.mlp_bias}
    return common.config(c, FAMILY.architecture, FAMILY.model_type) | biases


def links(paths, config, there=()):
    return linked(paths, NAMES, layer=LAYER)


FAMILY = Family(
    "llama",
    "LlamaForCausalLM",
    "model.",
    options,
    config,
    links,
    common.SHAPE_KEYS | {"attention_bias", "mlp_bias"},
    (ROTARY,),
)

"""OLMo 2: norms after attention and feed-forward, and over all queries and keys of a token."""

from jaxlm.hf import common
from jaxlm.hf.families import llama
from jaxlm.hf.family import Family, Json
from jaxlm.hf.links import linked
from jaxlm.models.options import DecoderConfig

NAMES = {name: theirs for name, theirs in llama.NAMES.items() if not name.endswith("_norm")} | {
    "final_norm": "model.norm",
    "attention_post_norm": "post_attention_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
    "attention/query_norm": "self_attn.q_norm",
    "attention/key_norm": "self_attn.k_norm",
}


def options(hf: Json) -> Json:
    return common.shape(hf, eps=1e-5) | {
        "attention_bias": bool(hf.get("attention_bias", False)),
        "norm_place": "after",
        "qk_norm": True,
        "qk_norm_over": "width",
    }


def config(c: DecoderConfig) -> Json:
    plain = common.config(c, FAMILY.architecture, FAMILY.model_type)
    return plain | {"attention_bias": c.attention_bias}


def links(paths, config, there=()):
    return linked(paths, NAMES, layer=llama.LAYER)


FAMILY = Family(
    "olmo2",
    "Olmo2ForCausalLM",
    "model.",
    options,
    config,
    links,
    common.SHAPE_KEYS | {"attention_bias"},
    (llama.ROTARY,),
)

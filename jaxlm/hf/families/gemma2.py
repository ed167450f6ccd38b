"""Gemma 2: norms on both sides stored less one, soft caps, a window in every other layer."""

from jaxlm.hf import common, pattern
from jaxlm.hf.families import llama
from jaxlm.hf.family import Family, Json
from jaxlm.hf.links import linked
from jaxlm.models.options import DecoderConfig

NAMES = llama.NAMES | {
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
KEYS = common.SHAPE_KEYS | {
    *("hidden_activation", "attention_bias", "query_pre_attn_scalar", "sliding_window"),
    *("attn_logit_softcapping", "final_logit_softcapping", "layer_types"),
    *("use_bidirectional_attention", "sliding_window_pattern", "_sliding_window_pattern"),
}


def shape(hf: Json, theta: float) -> Json:
    """What Gemma 2 and 3 share."""
    common.refuse(hf, use_bidirectional_attention=False)
    said = {"head_dim": 256} | {key: value for key, value in hf.items() if key != "hidden_act"}
    form = common.activation(hf, "hidden_activation", "gelu_pytorch_tanh", common.GATED)
    return common.shape(said, tied=True, theta=theta) | {
        "activation": form,
        "attention_bias": bool(hf.get("attention_bias", False)),
        "attention_scale": hf.get("query_pre_attn_scalar", 256) ** -0.5,
        "embedding_scale": hf["hidden_size"] ** 0.5,
        "norm": "rms_plus_one",
        "norm_place": "both",
    }


def options(hf: Json) -> Json:
    local = pattern.local(hf, lambda i: i % 2 == 0)
    return (
        shape(hf, 10000.0)
        | pattern.options(hf.get("sliding_window", 4096), local)
        | {
            "attention_soft_cap": float(hf.get("attn_logit_softcapping", 50.0) or 0.0),
            "logit_soft_cap": float(hf.get("final_logit_softcapping", 30.0) or 0.0),
        }
    )


def config(c: DecoderConfig) -> Json:
    return shape_config(c, FAMILY) | {
        "attn_logit_softcapping": c.attention_soft_cap or None,
        "final_logit_softcapping": c.logit_soft_cap or None,
    }


def shape_config(c: DecoderConfig, family: Family) -> Json:
    plain = common.config(c, family.architecture, family.model_type)
    scale = c.attention_scale or (c.head_width or c.width // c.heads) ** -0.5
    squared = scale**-2
    return plain | {
        "hidden_activation": plain["hidden_act"],
        "attention_bias": c.attention_bias,
        "query_pre_attn_scalar": round(squared) if round(squared) ** -0.5 == scale else squared,
        "sliding_window": c.window or None,
        "layer_types": pattern.types(c),
    }


def links(paths, config, there=()):
    return linked(paths, NAMES, layer=llama.LAYER)


FAMILY = Family("gemma2", "Gemma2ForCausalLM", "model.", options, config, links, KEYS)

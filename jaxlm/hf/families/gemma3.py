"""Gemma 3, text: Gemma 2 with normalised queries and keys instead of caps, and slower turns in the
layers without window.
"""

from jaxlm.hf import common, pattern, rope
from jaxlm.hf.families import gemma2, llama
from jaxlm.hf.family import Family, Json
from jaxlm.hf.links import linked
from jaxlm.models.options import DecoderConfig

NAMES = gemma2.NAMES | {
    "attention/query_norm": "self_attn.q_norm",
    "attention/key_norm": "self_attn.k_norm",
}
GLOBAL, LOCAL = 1e6, 1e4  # thetas where config.json is silent


def options(hf: Json) -> Json:
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        common.refuse(hf, **{key: None})
    every = hf.get("sliding_window_pattern") or hf.get("_sliding_window_pattern") or 6
    local = pattern.local(hf, lambda i: (i + 1) % every != 0)
    return (
        gemma2.shape({key: hf[key] for key in hf if key not in rope.KEYS}, GLOBAL)
        | pattern.options(hf.get("sliding_window", 4096), local, always=True)
        | _turns(hf)
        | ({"rope_scaling": ""} if all(local) else {})  # which is of the other layers
        | {"qk_norm": True}
    )


def _turns(hf: Json) -> Json:
    said = dict(hf.get("rope_parameters") or {})
    if pattern.FULL in said or pattern.SLIDING in said:
        whole = {"rope_theta": GLOBAL, "rope_type": "default"} | (said.get(pattern.FULL) or {})
        local = {"rope_theta": LOCAL, "rope_type": "default"} | (said.get(pattern.SLIDING) or {})
        common.refuse(local, rope_type="default", partial_rotary_factor=1)
        common.refuse(whole, partial_rotary_factor=1)
    else:
        whole = rope.parameters(hf, GLOBAL)
        local = {"rope_theta": hf.get("rope_local_base_freq", LOCAL)}
    return {
        "rope_theta": float(whole["rope_theta"]),
        "rope_scaling": rope.scaling(whole, hf),
        "local_rope_theta": float(local["rope_theta"]),
    }


def config(c: DecoderConfig) -> Json:
    return gemma2.shape_config(c, FAMILY) | {
        "rope_local_base_freq": c.local_rope_theta or c.rope_theta
    }


def links(paths, config, there=()):
    return linked(paths, NAMES, layer=llama.LAYER)


FAMILY = Family(
    "gemma3_text",
    "Gemma3ForCausalLM",
    "model.",
    options,
    config,
    links,
    gemma2.KEYS | {"rope_local_base_freq"},
)

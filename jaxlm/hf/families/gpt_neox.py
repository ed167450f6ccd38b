"""GPT-NeoX and Pythia: LayerNorm, biases, few rotary units, attention next to the feed-forward.

Query, key and value lie in one tensor, head by head. Older files also hold causal masks.
"""

from jaxlm.hf import common, rope
from jaxlm.hf.family import Family, Json
from jaxlm.hf.links import HeadwiseQKV, joined, linked
from jaxlm.models.options import DecoderConfig

LAYER = "gpt_neox.layers.{}."
NAMES = {
    "embed": "gpt_neox.embed_in",
    "final_norm": "gpt_neox.final_layer_norm",
    "head": "embed_out",
    "attention_norm": "input_layernorm",
    "attention/output": "attention.dense",
    "mlp_norm": "post_attention_layernorm",
    "mlp/up": "mlp.dense_h_to_4h",
    "mlp/down": "mlp.dense_4h_to_h",
}
QKV = ("attention/query", "attention/key", "attention/value")
MASKS = r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)"


def options(hf: Json) -> Json:
    common.refuse(hf, attention_bias=True)
    heads, width = (common.number(hf, k) for k in ("num_attention_heads", "hidden_size"))
    older = {"rope_theta": hf.get("rotary_emb_base", 10000.0)}  # here it has another name
    said = rope.parameters(hf | older, 0.0, partial=True)
    return {
        "vocabulary": common.number(hf, "vocab_size"),
        "width": width,
        "layers": common.number(hf, "num_hidden_layers"),
        "heads": heads,
        "kv_heads": heads,
        "head_width": common.share(hf, "hidden_size", "num_attention_heads"),
        "ffn_width": common.number(hf, "intermediate_size"),
        "activation": common.activation(hf, "hidden_act", "gelu", common.PLAIN),
        "norm": "layer",
        "norm_eps": float(hf.get("layer_norm_eps", 1e-5)),
        "bias": True,
        "tied": hf.get("tie_word_embeddings", False),
        "parallel_residual": hf.get("use_parallel_residual", True),
        "rotary_fraction": float(said.get("partial_rotary_factor", hf.get("rotary_pct", 0.25))),
        "rope_theta": float(said["rope_theta"]),
        "rope_scaling": rope.scaling(said, hf),
    }


def config(c: DecoderConfig) -> Json:
    said = rope.config(c.rope_theta, c.rope_scaling)
    return {
        "architectures": [FAMILY.architecture],
        "model_type": FAMILY.model_type,
        "vocab_size": c.vocabulary,
        "hidden_size": c.width,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "intermediate_size": c.ffn_width,
        "hidden_act": common.named(c.activation, common.PLAIN, "gelu"),
        "layer_norm_eps": c.norm_eps,
        "attention_bias": True,
        "tie_word_embeddings": c.tied,
        "use_parallel_residual": c.parallel_residual,
        "rotary_pct": c.rotary_fraction,
        "rotary_emb_base": c.rope_theta,
        **{key: value for key, value in said.items() if key != "rope_theta"},
    }


def links(paths, config, there=()):
    form = HeadwiseQKV(config.heads)
    fused, rest = joined(paths, QKV, "attention.query_key_value", LAYER, form, form)
    found, unknown = linked(rest, NAMES, layer=LAYER)
    return fused + found, unknown


FAMILY = Family(
    "gpt_neox",
    "GPTNeoXForCausalLM",
    "gpt_neox.",
    options,
    config,
    links,
    frozenset(
        {
            *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
            *("intermediate_size", "hidden_act", "layer_norm_eps", "tie_word_embeddings"),
            *("attention_bias", "use_parallel_residual", "rotary_pct", "rotary_emb_base"),
            *("rope_scaling", "rope_parameters"),
        }
    ),
    (MASKS,),
)

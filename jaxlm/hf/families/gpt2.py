"""GPT-2: learned positions, LayerNorm, biases, kernels stored as [in, out].

Query, key and value lie side by side in one tensor. Older files also hold causal masks.
"""

from jaxlm.hf import common
from jaxlm.hf.family import Family, Json
from jaxlm.hf.links import SAME, Columns, Link, joined, linked
from jaxlm.models.options import DecoderConfig

LAYER = "transformer.h.{}."
NAMES = {
    "embed": "transformer.wte",
    "final_norm": "transformer.ln_f",
    "attention_norm": "ln_1",
    "attention/output": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp/up": "mlp.c_fc",
    "mlp/down": "mlp.c_proj",
}
QKV = ("attention/query", "attention/key", "attention/value")
POSITIONS = Link(("embed/positions",), ("transformer.wpe.weight",), SAME)
MASKS = r"transformer\.h\.\d+\.attn\.(bias|masked_bias)"


def options(hf: Json) -> Json:
    common.refuse(
        hf,
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        reorder_and_upcast_attn=False,
        add_cross_attention=False,
        tie_word_embeddings=True,
    )
    heads, width = common.number(hf, "n_head"), common.number(hf, "n_embd")
    form = common.activation(hf, "activation_function", "gelu_new", common.PLAIN)
    return {
        "vocabulary": common.number(hf, "vocab_size"),
        "width": width,
        "layers": common.number(hf, "n_layer"),
        "heads": heads,
        "kv_heads": heads,
        "head_width": common.share(hf, "n_embd", "n_head"),
        "ffn_width": hf.get("n_inner") or 4 * width,
        "activation": form,
        "norm": "layer",
        "norm_eps": float(hf.get("layer_norm_epsilon", 1e-5)),
        "bias": True,
        "tied": True,
        "learned_positions": common.number(hf, "n_positions"),
    }


def config(c: DecoderConfig) -> Json:
    return {
        "architectures": [FAMILY.architecture],
        "model_type": FAMILY.model_type,
        "vocab_size": c.vocabulary,
        "n_embd": c.width,
        "n_layer": c.layers,
        "n_head": c.heads,
        "n_inner": c.ffn_width,
        "n_positions": c.learned_positions or 1,
        "activation_function": common.named(c.activation, common.PLAIN, "gelu_new"),
        "layer_norm_epsilon": c.norm_eps,
        "tie_word_embeddings": True,
    }


def links(paths, config, there=()):
    form = Columns(3)
    fused, rest = joined(paths, QKV, "attn.c_attn", LAYER, form, form)
    table = [POSITIONS] if "embed/positions" in rest else []
    rest = [path for path in rest if path != "embed/positions"]
    found, unknown = linked(rest, NAMES, layer=LAYER, kernels=SAME)
    return fused + table + found, unknown


FAMILY = Family(
    "gpt2",
    "GPT2LMHeadModel",
    "transformer.",
    options,
    config,
    links,
    frozenset(
        {
            *("vocab_size", "n_embd", "n_layer", "n_head", "n_inner", "n_positions", "n_ctx"),
            *("activation_function", "layer_norm_epsilon", "scale_attn_weights"),
            *("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"),
            *("add_cross_attention", "tie_word_embeddings"),
            *("summary_activation", "summary_first_dropout", "summary_proj_to_labels"),
            *("summary_type", "summary_use_proj"),
        }
    ),
    (MASKS,),
)

"""Mixtral: a Llama whose feed-forward is a choice of experts.

Files hold a tensor for each expert, as published, or all experts of a layer in one, as transformers
5 has them in memory; both are read, and the first is written.
"""

from jaxlm.hf import common, pattern
from jaxlm.hf.families import llama
from jaxlm.hf.family import Family, Json
from jaxlm.hf.links import AllExperts, EachExpert, Link, joined, linked
from jaxlm.models.options import DecoderConfig

PUBLISHED, FUSED = "block_sparse_moe", "mlp"
EXPERTS = {"gate": "w1", "up": "w3", "down": "w2"}


def options(hf: Json) -> Json:
    common.refuse(hf, router_jitter_noise=0.0)
    usual = {"num_key_value_heads": 8}
    experts, chosen = hf.get("num_local_experts", 8), hf.get("num_experts_per_tok", 2)
    if chosen > experts:
        raise ValueError(
            f"config.json says num_experts_per_tok={chosen}, more than num_local_experts={experts}"
        )
    return (
        common.shape(usual | hf, theta=1e6, eps=1e-5)
        | pattern.options(hf.get("sliding_window"), pattern.local(hf, lambda i: True))
        | {
            "experts": experts,
            "experts_per_token": chosen,
            "router_balance": float(hf.get("router_aux_loss_coef", 0.001)),
        }
    )


def config(c: DecoderConfig) -> Json:
    plain = common.config(c, FAMILY.architecture, FAMILY.model_type)
    return plain | {
        "sliding_window": c.window or None,
        "num_local_experts": c.experts or 1,
        "num_experts_per_tok": c.experts_per_token,
        "router_aux_loss_coef": c.router_balance,
    }


def links(paths, config, there=()):
    fused = any(name.endswith("mlp.experts.down_proj") for name in there)
    names = llama.NAMES | {"mlp/router": f"{FUSED if fused else PUBLISHED}.gate"}
    found, experts = linked(paths, names, layer=llama.LAYER)
    if fused:
        gates, experts = _fused(experts, ("gate", "up"), "gate_up_proj")
        downs, experts = _fused(experts, ("down",), "down_proj")
        return found + gates + downs, experts
    unknown = []
    for path in experts:
        parts = path.split("/")
        if parts[2:4] != ["mlp", "experts"] or parts[-1] != "kernel":
            unknown.append(path)
            continue
        prefix = f"{llama.LAYER.format(parts[1])}{PUBLISHED}.experts"
        each = [f"{prefix}.{e}.{EXPERTS[parts[4]]}.weight" for e in range(config.experts)]
        found.append(Link((path,), tuple(each), EachExpert()))
    return found, unknown


def _fused(paths, parts, name):
    """The experts of a layer in one tensor, whose name ends without ".weight"."""
    form = AllExperts(len(parts))
    ours = tuple(f"mlp/experts/{part}" for part in parts)
    found, rest = joined(paths, ours, f"{FUSED}.experts.{name}", llama.LAYER, form, form)
    bare = lambda name: name.removesuffix(".weight")
    return [Link(one.ours, tuple(map(bare, one.theirs)), one.form) for one in found], rest


FAMILY = Family(
    "mixtral",
    "MixtralForCausalLM",
    "model.",
    options,
    config,
    links,
    common.SHAPE_KEYS
    | {"sliding_window", "layer_types", "num_local_experts", "num_experts_per_tok"}
    | {"router_aux_loss_coef", "router_jitter_noise"},
    (llama.ROTARY,),
)

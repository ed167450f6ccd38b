"""LoRA adapters as PEFT stores them: adapter_config.json and adapter_model.safetensors.

An adapted module of theirs has `lora_A.weight` [R, I] and `lora_B.weight` [O, R], under the name of
the module with "base_model.model." in front. Read, they are merged into the tensors of a folder as
these come in, fused or not; written, each of our kernels has to be a module of its own there.

Letters: I and O what a kernel takes and gives, R the rank.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlm.checkpoint.stacks import Shapes, of_layers, places
from jaxlm.hf import keys, tensors, wrapped
from jaxlm.hf.family import Family, Json
from jaxlm.hf.links import Columns, Link, Same, Transposed
from jaxlm.hf.tensors import Spec, names_of
from jaxlm.models import lora
from jaxlm.models.options import DecoderConfig

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."

# Keys that say how an adapter was made, or where it lies, and nothing of what it computes.
HARMLESS = {
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "auto_mapping", "r"),
    *("lora_alpha", "lora_dropout", "use_rslora", "target_modules", "exclude_modules"),
    *("fan_in_fan_out", "inference_mode", "peft_version", "layers_to_transform"),
    *("layers_pattern", "megatron_core", "runtime_config", "qalora_group_size", "loftq_config"),
    *("ensure_weight_tying", "eva_config", "corda_config", "arrow_config", "lora_ga_config"),
    "megatron_config",
}
# Some that compute something else where they are set, and what they are set to where they do not.
PLAIN = {"bias": "none", "init_lora_weights": (True, False, "gaussian")}


class Adapter(NamedTuple):
    """What is added to the tensors of a folder."""

    scale: float
    factors: dict[str, tuple[Spec, Spec]]  # tensor of the model -> lora_A and lora_B
    others: Mapping[str, int]  # pairs for the rest of a larger model, by its parts (`hf.wrapped`)


def read(path: Path, inside: str = "") -> Adapter:
    """An adapter's folder; `inside`: the larger model around the one it is for, if there is one.

    Raises `ValueError` for whatever is wrong, or not supported.
    """
    try:
        config = json.loads((path / CONFIG).read_text())
        kind = config["peft_type"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is no folder of a PEFT adapter: no readable {CONFIG}") from None
    if kind != "LORA":
        raise ValueError(f"{path} holds an adapter of the kind {kind!r}; only LORA is known here")
    if wrong := [key for key, value in config.items() if _means_more(key, value)]:
        said = ", ".join(f"{key}={config[key]!r}" for key in sorted(wrong))
        raise ValueError(f"{path / CONFIG} sets {said}, which is not supported")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    known = {"r": keys.SIZE.fits(rank), "lora_alpha": keys.POSITIVE.fits(alpha)}
    if unknown := [key for key, is_known in known.items() if not is_known]:
        raise ValueError(
            f"{path / CONFIG} does not say {' and '.join(unknown)}, and so not what its factors "
            "are scaled by; copy the numbers that the adapter was trained with into it"
        )
    if not (path / WEIGHTS).is_file():
        raise ValueError(f"{path} has no {WEIGHTS}; other files are read by running code in them")
    found = tensors.specs(path / WEIGHTS)
    bare = {name.removeprefix(PREFIX): spec for name, spec in found.items()}
    end = re.compile(r"(.*)\.lora_([AB])\.weight")
    if odd := [name for name in bare if not end.fullmatch(name)]:
        raise ValueError(f"{path / WEIGHTS} holds more than LoRA's factors: {names_of(odd)}")
    modules = {name.removesuffix(".lora_A.weight") for name in bare if ".lora_A." in name}
    factor = lambda module, which: bare.get(f"{module}.lora_{which}.weight")
    pairs = {f"{module}.weight": (factor(module, "A"), factor(module, "B")) for module in modules}
    whole = {n: (a, b) for n, (a, b) in pairs.items() if a and b and a.shape[0] == b.shape[1]}
    if 2 * len(whole) != len(bare):
        raise ValueError(f"{path / WEIGHTS} is not whole: a lora_A lacks a lora_B that fits it")
    if other := sorted(name for name, (a, _) in whole.items() if a.shape[0] != rank):
        raise ValueError(
            f"{path / CONFIG} says r={rank}, by which factors are scaled, and those of {other[0]} "
            f"have a rank of {whole[other[0]][0].shape[0]}: the two do not belong together"
        )
    factors, others = wrapped.taken_out(whole) if inside else (whole, {})
    return Adapter(lora.scale(rank, alpha, bool(config.get("use_rslora"))), factors, others)


def _means_more(key, value):
    if key in PLAIN:
        usual = PLAIN[key] if isinstance(PLAIN[key], tuple) else (PLAIN[key],)
        return not any(value is one or value == one for one in usual)
    return key not in HARMLESS and bool(value)


def require_places(adapter: Adapter, there: Mapping[str, Spec]) -> None:
    """Raises `ValueError` unless every factor belongs to a tensor of the model and fits it."""
    if lost := adapter.factors.keys() - there.keys():
        raise ValueError(f"the adapter has factors for what the model has not: {names_of(lost)}")
    fits = lambda name, a, b: {a.shape[1], b.shape[0]} == set(there[name].shape)
    if wrong := [name for name, pair in adapter.factors.items() if not fits(name, *pair)]:
        raise ValueError(f"the adapter is of another model: shapes differ at {names_of(wrong)}")


def merged(adapter: Adapter | None, name: str, x: jax.Array, form: Any) -> jax.Array:
    """A tensor of theirs with the product of its factors, if there are such."""
    if adapter is None or name not in adapter.factors:
        return x
    a_RI, b_OR = (np.asarray(tensors.view(spec), np.float32) for spec in adapter.factors[name])
    stored_as_ours = isinstance(form, (Same, Columns))  # [in, out], as GPT-2 has kernels
    factors = (a_RI.T, b_OR.T) if stored_as_ours else (b_OR, a_RI)
    return jax.jit(lora.added, out_shardings=x.sharding)(x, *factors, adapter.scale)


def write(
    out: Path,
    family: Family,
    options: DecoderConfig,
    knobs: Json,
    base: str,
    shapes: Shapes,
    factors: Shapes,
    load: Callable[[list[str]], Mapping[str, jax.Array]],
    inside: str = "",
) -> None:
    """Writes an adapter's folder. Raises `ValueError` for kernels that are no module of theirs.

    `knobs`: of `methods.lora`; `base`: name of the model that it belongs to. `shapes`, `factors`:
    of the arrays of the model and of the adapter; `load` brings the latter into memory. `inside`:
    the larger model that the base is, if it is one.
    """
    links, _ = family.links(list(of_layers(shapes)), options, ())
    by_path = {path: link for link in links for path in link.ours}
    where = places(factors)
    paths = sorted({path.rpartition("/")[0] for path in where})
    found = {path: by_path[f"{path}/{lora.KERNEL}"] for path in paths}
    if fused := [path for path, link in found.items() if not _is_module(link)]:
        raise ValueError(
            f"{names_of(fused)}: a {family.model_type} has them in one tensor with others, so "
            "their adapters are none of PEFT's; write the merged model with to-hf"
        )
    modules = {path: link.theirs[0].removesuffix(".weight") for path, link in found.items()}
    targets: Any = sorted({re.sub(r"^.*?\.\d+\.", "", name) for name in modules.values()})
    if inside:  # whose other parts may have modules of the same names
        modules = {path: wrapped.in_memory(name) for path, name in modules.items()}
        targets = rf".*\blanguage_model\..*\.({'|'.join(map(re.escape, targets))})"
    theirs = {
        f"{PREFIX}{module}.lora_{letter}.weight": f"{path}/{factor}"
        for path, module in modules.items()
        for factor, letter in ((lora.A, "A"), (lora.B, "B"))
    }
    ours, kind = of_layers(factors), np.dtype(np.float32)
    layout = {name: (ours[path][::-1], kind) for name, path in theirs.items()}
    arrays = load(list(factors))
    with tensors.Writer(out, layout, 2**62) as writer:
        for name, path in theirs.items():
            held, layer = where[path]
            x = arrays[held] if layer is None else arrays[held][layer]
            writer.put(name, np.asarray(x, kind).T)
    (out / "model.safetensors").rename(out / WEIGHTS)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": knobs["rank"],
        "lora_alpha": knobs["alpha"],
        "lora_dropout": knobs["dropout"],
        "use_rslora": knobs["rslora"],
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": any(isinstance(link.form, Same) for link in found.values()),
        "inference_mode": True,
    }
    (out / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _is_module(link: Link) -> bool:
    alone = len(link.ours) == len(link.theirs) == 1
    return alone and isinstance(link.form, (Same, Transposed))

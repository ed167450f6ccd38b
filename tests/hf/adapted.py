"""PEFT adapters for the tiny models, and what a run with LoRA on them leaves, without training."""

import json

import jax
import numpy as np
from cases import draw
from reckoning import Ours

from jaxlm.checkpoint import Checkpoints
from jaxlm.config import check, defaults, source
from jaxlm.contract import BASE, bound
from jaxlm.hf import kept, peft, tensors
from jaxlm.methods.lora import lora

TOWER = "gemma3, with a tower for images"
# Case -> modules of theirs behind the number of the layer, with what they take and give.
ADAPTED = {
    "llama": {
        "self_attn.q_proj": (32, 32),
        "self_attn.v_proj": (32, 16),
        "self_attn.o_proj": (32, 32),
        "mlp.gate_proj": (32, 48),
        "mlp.down_proj": (48, 32),
    },
    "gpt2": {"attn.c_attn": (32, 96), "attn.c_proj": (32, 32), "mlp.c_fc": (32, 128)},
    "gpt_neox": {"attention.query_key_value": (32, 96), "mlp.dense_4h_to_h": (48, 32)},
    TOWER: {"self_attn.q_proj": (32, 48), "mlp.down_proj": (48, 32)},
}
LAYER = {
    "llama": "model.layers.",
    "gpt2": "transformer.h.",
    "gpt_neox": "gpt_neox.layers.",
    TOWER: "model.language_model.layers.",
}
KNOBS = {"rank": 2, "alpha": 6.0, "dropout": 0.0, "rslora": True}


def draw_adapter(folder, name, **options):
    """Writes a PEFT folder for a case; its numbers follow from the names of its tensors."""
    folder.mkdir()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "",
        "r": KNOBS["rank"],
        "lora_alpha": KNOBS["alpha"],
        "use_rslora": KNOBS["rslora"],
        "target_modules": list(ADAPTED[name]),
        "fan_in_fan_out": name == "gpt2",
        "bias": "none",
    }
    (folder / peft.CONFIG).write_text(json.dumps(config | options))
    layout, kind = {}, np.dtype(np.float32)
    for layer in range(2):
        for module, (takes, gives) in ADAPTED[name].items():
            prefix = f"{peft.PREFIX}{LAYER[name]}{layer}.{module}.lora_"
            layout[f"{prefix}A.weight"] = (KNOBS["rank"], takes), kind
            layout[f"{prefix}B.weight"] = (gives, KNOBS["rank"]), kind
    with tensors.Writer(folder, layout, 10**9) as writer:
        for tensor, (shape, _) in layout.items():
            writer.put(tensor, draw(tensor, shape))
    (folder / "model.safetensors").rename(folder / peft.WEIGHTS)


def a_run(workdir, hf_folder, **knobs):
    """Leaves a run's checkpoint of adapters; returns (params) -> (batch) -> logits, and params."""
    ours, knobs = Ours(hf_folder), KNOBS | knobs
    method = lora(**knobs)
    c = defaults()
    c.method = "next_token + lora"
    c.lora.update(knobs)
    c.init.hf = str(hf_folder)
    c.data.mix.text = source(source="none", weight=1.0)
    c.data.tokenizer = "byte"
    workdir.mkdir()
    kept.write(workdir, kept.of_hf(hf_folder, ours.options))
    base = method.extras[BASE].init(ours.params, None)
    trained = bound(ours.lm, method, {BASE: base})
    wave = lambda x: x + 0.3 * np.cos(np.arange(x.size, dtype=np.float32)).reshape(x.shape)
    params = jax.tree.map(wave, trained.init(jax.random.key(0)))
    assert method.adapter
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        checkpoints.save_once(BASE, base)
        about = {"config": check(c).config, "adapter": dict(method.adapter.about)}
        checkpoints.save(3, {"params": params}, about)
    return jax.jit(lambda batch: trained.unembed(params, trained.hidden(params, batch)[0]))

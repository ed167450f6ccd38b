"""The random Llama of `local_tasks` opened without the converter, and our harness over it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from jaxlm.evals import texts
from jaxlm.evals.harness import Jaxlm
from jaxlm.evals.score import Scorer
from jaxlm.models.transformer import DecoderConfig, decoder


def opened(folder):
    """(lm, params) of the folder that `local_tasks.write_model` made."""
    c = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    lm = decoder(
        DecoderConfig(
            vocabulary=c["vocab_size"],
            width=c["hidden_size"],
            layers=c["num_hidden_layers"],
            heads=c["num_attention_heads"],
            kv_heads=c["num_key_value_heads"],
            head_width=c["head_dim"],
            ffn_width=c["intermediate_size"],
            norm_eps=c["rms_norm_eps"],
            tied=False,
        ),
        "cpu",
    )
    kernel = lambda name: {"kernel": tensors[f"{name}.weight"].T}
    scale = lambda name: {"scale": tensors[f"{name}.weight"]}

    def block(i):
        at = f"model.layers.{i}."
        parts = {"query": "q", "key": "k", "value": "v", "output": "o"}
        return {
            "attention_norm": scale(f"{at}input_layernorm"),
            "attention": {p: kernel(f"{at}self_attn.{q}_proj") for p, q in parts.items()},
            "mlp_norm": scale(f"{at}post_attention_layernorm"),
            "mlp": {p: kernel(f"{at}mlp.{p}_proj") for p in ("gate", "up", "down")},
        }

    return lm, {
        "embed": {"table": tensors["model.embed_tokens.weight"]},
        "final_norm": scale("model.norm"),
        "head": kernel("lm_head"),
        "blocks": {str(i): block(i) for i in range(c["num_hidden_layers"])},
    }


def harness(folder, add_bos=None):
    """Our lm-eval model; it generates by reading everything again for each token."""
    lm, params = opened(folder)
    params = jax.tree.map(jnp.asarray, params)
    length = json.loads((folder / "config.json").read_text())["max_position_embeddings"]
    given = texts.load(folder, add_bos)
    end = given.tokenizer.eos_token_id
    scorer = Scorer(lm, length)

    @jax.jit
    def likeliest(tokens, used):
        place = np.broadcast_to(np.arange(length), tokens.shape)
        batch = {"tokens": tokens, "segments": (place < used[:, None]).astype(int)}
        hidden, _, _ = lm.hidden(params, batch | {"positions": place})
        return lm.unembed(params, hidden).argmax(-1)

    def generate(prompts):
        rows = [list(prompt.ids) for prompt in prompts]
        for _ in range(max(prompt.tokens for prompt in prompts)):
            tokens = np.zeros((len(rows), length), np.int32)
            for row, ids in zip(tokens, rows, strict=True):
                row[: len(ids)] = ids
            used = np.array([len(ids) for ids in rows])
            found = np.asarray(likeliest(tokens, used))
            for row, ids in zip(found, rows, strict=True):
                if len(ids) < length and ids[-1] != end:
                    ids.append(int(row[len(ids) - 1]))
        return [r[len(p.ids) :][: p.tokens] for r, p in zip(rows, prompts, strict=True)]

    return Jaxlm(given, length, lambda r: scorer(params, r), generate)

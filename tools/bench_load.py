"""Seconds and memory to load a Hugging Face folder, beside torch's from_pretrained.

    python tools/bench_load.py [--gb=1] [--dtype=bfloat16]

Makes a Llama of about that size with random weights, in two files, and then loads it in turns, each
time in a process of its own: ours onto the device, as training and generation do (on a CPU kernels
are transposed on the way), torch's `from_pretrained`. Seconds count from after the imports until
every parameter was read once; memory is the peak of the process, without what it held before
loading. Ours is also measured through `convert from-hf`, which writes as much as it reads.
"""

import argparse
import json
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import ml_dtypes
import numpy as np

WAYS = ("jaxlm", "torch", "convert")


def make(folder, gigabytes, dtype):
    """A folder with a Llama of about so many bytes; returns how many."""
    from jaxlm.hf import tensors

    width, ffn, vocabulary = 1024, 2816, 32000
    layer = {
        **dict.fromkeys(("self_attn.q_proj", "self_attn.o_proj"), (width, width)),
        **dict.fromkeys(("self_attn.k_proj", "self_attn.v_proj"), (width // 2, width)),
        **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (ffn, width)),
        "mlp.down_proj": (width, ffn),
        **dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (width,)),
    }
    ends = {"model.embed_tokens": (vocabulary, width), "model.norm": (width,)}
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    size = lambda shapes: sum(int(np.prod(shape)) for shape in shapes.values()) * kind.itemsize
    layers = max(round((gigabytes * 1e9 - size(ends)) / size(layer)), 1)
    shapes = ends | {f"model.layers.{i}.{n}": s for i in range(layers) for n, s in layer.items()}
    layout = {f"{name}.weight": (shape, kind) for name, shape in shapes.items()}
    total = size(shapes)
    rng = np.random.default_rng(0)
    with tensors.Writer(folder, layout, total // 2 + 1) as writer:
        for name, (shape, _) in layout.items():
            writer.put(name, (0.02 * rng.standard_normal(shape, np.float32)).astype(kind))
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
        "dtype": dtype,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return total


def measure(way, folder):
    """Prints seconds and bytes of one loading."""
    load = {"jaxlm": _jaxlm, "torch": _torch, "convert": _convert}[way](folder)
    before, began = _peak(), time.perf_counter()
    load()
    print(json.dumps({"seconds": time.perf_counter() - began, "bytes": _peak() - before}))


def _peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _jaxlm(folder):
    import jax

    from jaxlm.hf.folder import open_folder
    from jaxlm.hf.load import load
    from jaxlm.models.transformer import decoder

    jax.block_until_ready(jax.numpy.ones(3) + 1)

    def run():
        source = open_folder(folder)
        abstract = jax.eval_shape(decoder(source.options, "cpu").init, jax.random.key(0))
        params = load(source, abstract, source.options)
        for leaf in jax.tree.leaves(params):
            np.asarray(leaf).view(np.uint8).reshape(-1)[::4096].sum()

    return run


def _torch(folder):
    import torch
    from transformers import AutoModelForCausalLM, logging
    from transformers.models.llama import modeling_llama  # noqa: F401

    logging.disable_progress_bar()

    def run():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        for leaf in model.parameters():
            leaf.detach().view(torch.uint8).reshape(-1)[::4096].sum()

    return run


def _convert(folder):
    from jaxlm.convert import from_hf

    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        out = pathlib.Path(scratch) / "out"

    return lambda: from_hf(folder, out, say=lambda text: None)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=1.0)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32", "float16"))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--measure", default="", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.measure:
        return measure(flags.measure, flags.folder)
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch) / "hf"
        folder.mkdir()
        gigabytes = make(folder, flags.gb, flags.dtype) / 1e9
        rows = {way: [] for way in flags.ways.split(",")}
        for _ in range(flags.turns):
            for way, found in rows.items():
                command = [sys.executable, __file__, f"--measure={way}", f"--folder={folder}"]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(f"{way} ended with code {done.returncode}:\n{done.stderr}")
                found.append(json.loads(done.stdout.splitlines()[-1]))
                for old in folder.parent.glob("tmp*"):
                    subprocess.run(["rm", "-rf", old], check=True)
    print(f"{gigabytes:.2f} GB of {flags.dtype}, {flags.turns} turns: median (best) seconds a GB")
    print(f"{'':8}  seconds/GB     peak GB/GB")
    for way, found in rows.items():
        seconds = sorted(one["seconds"] / gigabytes for one in found)
        memory = max(one["bytes"] for one in found) / 1e9 / gigabytes
        print(f"{way:8}  {seconds[len(seconds) // 2]:.2f} ({seconds[0]:.2f})    {memory:.2f}")
    return None


if __name__ == "__main__":
    main()

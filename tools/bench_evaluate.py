"""Requests a second of our lm-eval model and of lm-eval's own `hf` backend, on one checkpoint.

    python tools/bench_evaluate.py [--width=512] [--layers=8] [--items=100] [--hf_batch=8]

Needs torch, transformers, accelerate and lm-eval beside jaxlm. Both score and generate for the same
requests in float32, one after the other in one run; the answers are compared. Ours is timed from
cold, with what it compiles, and again warm. `items`: questions of each kind.
"""

import argparse
import os
import pathlib
import random
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = os.environ["TQDM_DISABLE"] = "1"

import jax

from tests.evals import local_tasks
from tools.evaluation_parity import opened


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("width", 512), ("layers", 8), ("items", 100), ("hf_batch", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = pathlib.Path(folder) / "model"
        tensors = local_tasks.write_model(model, bos=True, **shape(flags))
        parameters = sum(tensor.size for tensor in tensors.values())
        asked = requests(flags.items)
        theirs = timed(torch_backend(model, flags.hf_batch), asked)
        lm = opened(model)
        cold, warm = timed(lm, asked), timed(lm, asked)
    print(
        f"{parameters / 1e6:.0f}M parameters, float32, {jax.device_count()} {jax.devices()[0]}, "
        f"jax {jax.__version__}; hf in batches of {flags.hf_batch}"
    )
    head = ("hf", "cold", "warm", "ratio")
    print(f"{'requests a second':24} {'number':>7} " + " ".join(f"{h:>8}" for h in head) + "  gap")
    for kind, some in asked.items():
        each = [len(some) / found[kind][0] for found in (theirs, cold, warm)]
        gap = local_tasks.largest_gap(theirs[kind][1], warm[kind][1])
        print(
            f"{kind:24} {len(some):7,} {each[0]:8.1f} {each[1]:8.1f} {each[2]:8.1f} "
            f"{each[2] / each[0]:7.2f}x  {gap:.1e}"
        )


def shape(flags):
    """A Llama of that width and depth, heads 64 wide, with 8,192 rows of vocabulary."""
    return {
        "hidden_size": flags.width,
        "intermediate_size": 64 * round(flags.width * 8 / 3 / 64),
        "num_hidden_layers": flags.layers,
        "num_attention_heads": flags.width // 64,
        "num_key_value_heads": flags.width // 64,
        "head_dim": 64,
        "max_position_embeddings": 1024,
        "vocab_size": 8192,
    }


def requests(items):
    """Kind -> (method of the model, arguments) of each request; contexts of 50 to 300 tokens."""
    rng = random.Random(0)
    say = lambda low, high: " ".join(rng.choices(local_tasks.WORDS, k=rng.randint(low, high)))
    contexts = [say(15, 90) for _ in range(items)]
    letters = [f" {letter}" for letter in "ABCD"]
    until = {"until": ["\n\n"], "max_gen_toks": 32, "do_sample": False}
    return {
        "options of some words": [
            ("loglikelihood", (c, f" {say(2, 8)}")) for c in contexts for _ in range(4)
        ],
        "options of one token": [("loglikelihood", (c, o)) for c in contexts for o in letters],
        "whole texts": [("loglikelihood_rolling", (say(40, 400),)) for _ in range(items // 2)],
        "generation, 32 tokens": [("generate_until", (c, until)) for c in contexts[: items // 2]],
    }


def timed(lm, asked):
    """Kind -> (seconds, answers)."""
    from lm_eval.api.instance import Instance

    found = {}
    for kind, some in asked.items():
        made = [Instance(method, {}, args, i) for i, (method, args) in enumerate(some)]
        begin = time.perf_counter()
        answers = getattr(lm, some[0][0])(made)
        found[kind] = time.perf_counter() - begin, [[answer] for answer in answers]
    return found


def torch_backend(folder, batch):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=batch)


if __name__ == "__main__":
    main()

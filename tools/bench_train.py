"""Tokens/s of our real training step beside Hugging Face's Llama on torch, on this machine.

    python tools/bench_train.py --torch=python          # which Python has torch and transformers
    python tools/bench_train.py --variant=attention=xla --variant=loss_chunk=0,remat=full
    python tools/bench_train.py --shape=quickstart --optimizer=muon

Same shape, tied embeddings, AdamW, gradients clipped by their global norm, both with our memory
settings (`host/hugepages.py`), each in a process of its own. They take turns of `--steps` steps and
never run at the same time; a ratio is the median over the rounds of one turn's rate against the
other's in the same round. Ours takes its loss in chunks of 512 tokens, as the quickstart does, and
reads segments and positions, so documents could be packed. torch runs sdpa attention and fused
AdamW; in bfloat16 once under autocast (parameters in float32, as ours) and once with everything in
bfloat16. Processor seconds say more than tokens/s where others use the machine too.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

from peers import Worker, serve


@dataclasses.dataclass(frozen=True)
class Shape:
    """One model and batch."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    ffn_width: int
    vocabulary: int
    length: int
    batch: int


SHAPES = {
    "base": Shape(512, 8, 8, 4, 1408, 8192, 512, 8),
    "quickstart": Shape(128, 4, 2, 2, 384, 4096, 128, 16),
    "toy": Shape(32, 2, 2, 1, 64, 128, 16, 4),
}


# The two contestants: each returns a function that takes one step and waits for it.


def jax_step(shape: Shape, dtype: str, optimizer: str, overrides: dict):
    """Our step as `train` builds it, for one device."""
    import jax
    import numpy as np

    from jaxlm.methods.next_token import next_token
    from jaxlm.models.transformer import DecoderConfig, decoder
    from jaxlm.optim import OptimizerSpec, build
    from jaxlm.step import init_state, make_step

    model = dataclasses.asdict(shape)
    rows, length = model.pop("batch"), model.pop("length")
    lm = decoder(DecoderConfig(**{"dtype": dtype, "loss_chunk": 512, **model, **overrides}), "cpu")
    tx, _ = build(OptimizerSpec(name=optimizer, learning_rate=1e-4), 1000, lm.axes)
    method = next_token()
    state = jax.jit(lambda key: init_state(lm.init(key), method, tx))(jax.random.key(0))
    words = np.random.default_rng(0).integers(0, shape.vocabulary, (rows, length + 1))
    ones = np.ones((rows, length), np.int32)
    batch = jax.device_put({
        "tokens": words[:, :-1].astype(np.int32),
        "targets": words[:, 1:].astype(np.int32),
        "weights": ones.astype(np.float32),
        "segments": ones,
        "positions": ones.cumsum(axis=1, dtype=np.int32) - 1,
    })  # fmt: skip
    key = jax.random.key(1)
    compiled = make_step(lm, method, tx).lower(state, batch, key).compile()

    def step():
        nonlocal state
        state, metrics = compiled(state, batch, key)
        return float(metrics["loss"])

    megabytes = compiled.memory_analysis().temp_size_in_bytes / 1e6
    return step, f"jax {jax.__version__}, {megabytes:.0f} MB temporary"


def llama(shape: Shape):
    """Hugging Face's model of that shape, on torch."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.ffn_width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.length,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def torch_step(shape: Shape, dtype: str, optimizer: str, overrides: dict):
    """A plain training loop's step around `LlamaForCausalLM`."""
    import torch

    del optimizer
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    model = llama(shape)
    autocast = bool(overrides.get("autocast"))
    if dtype == "bfloat16" and not autocast:
        model = model.to(torch.bfloat16)
    adam = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    words = torch.randint(0, shape.vocabulary, (shape.batch, shape.length))

    def step():
        adam.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = model(input_ids=words, labels=words).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        return loss.item()

    return step, f"torch {torch.__version__}"


def work(args):
    """A worker: builds and warms up one contestant; a turn is `--steps` steps."""
    job = json.loads(args.worker)
    make = {"jax": jax_step, "torch": torch_step}[job["side"]]
    began = time.perf_counter()
    step, about = make(SHAPES[args.shape], job["dtype"], args.optimizer, job["overrides"])
    step()
    step()
    ready = {"about": about, "seconds": time.perf_counter() - began}
    serve(ready, lambda _: {"loss": [step() for _ in range(args.steps)][-1]})


def contestants(args) -> list[Worker]:
    """One of ours for each dtype and variant, and torch's where a Python for it was named."""
    jobs = []
    for dtype in args.dtypes.split(","):
        jobs.append((dtype, sys.executable, {"side": "jax", "dtype": dtype, "overrides": {}}))
        for variant in args.variant:
            overrides = {
                k: _number(v) for k, _, v in (x.partition("=") for x in variant.split(","))
            }
            job = {"side": "jax", "dtype": dtype, "overrides": overrides}
            jobs.append((f"{dtype}, {variant}", sys.executable, job))
        if args.torch:
            job = {"side": "torch", "dtype": dtype, "overrides": {}}
            jobs.append((f"torch {dtype}", args.torch, job))
            if dtype == "bfloat16":
                job = {**job, "overrides": {"autocast": True}}
                jobs.append((f"torch {dtype}, autocast", args.torch, job))
    flags = f"--shape={args.shape}", f"--steps={args.steps}", f"--optimizer={args.optimizer}"
    workers = []
    for name, python, job in jobs:
        workers.append(Worker(name, __file__, python, job, *flags))
        ready = workers[-1].ready
        print(f"{name:28} {ready['about']}, ready in {ready['seconds']:.1f} s", flush=True)
    return workers


def table(workers: list[Worker], tokens: int, steps: int) -> str:
    """Rates, processor seconds and, against the first of each other kind, median paired ratios."""
    versus = [w for w in workers if w.name.startswith("torch")] or workers[:1]
    lines = [f"\n{'':28}{'tokens/s':>10}{'best':>9}{'cpu s/step':>12}{'loss':>8}  ratio to"]
    for w in workers:
        rates = [tokens * steps / turn["wall"] for turn in w.turns]
        cpu = min(turn["cpu"] for turn in w.turns) / steps
        line = f"{w.name:28}{statistics.median(rates):10,.0f}{max(rates):9,.0f}{cpu:12.3f}"
        line += f"{w.turns[-1]['loss']:8.3f}"
        for other in versus:
            pairs = zip(w.turns, other.turns, strict=True)
            ratio = statistics.median(b["wall"] / a["wall"] for a, b in pairs)
            line += f"  {ratio:.2f} {other.name}"
        lines.append(line)
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="base")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--optimizer", default="adamw", help="ours; torch always runs AdamW")
    parser.add_argument("--variant", action="append", default=[], help="model keys to compare")
    parser.add_argument("--torch", default="", help="a Python that has torch and transformers")
    parser.add_argument("--steps", type=int, default=2, help="steps of one turn")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="toy shape, one round")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        return work(args)
    if args.quick:
        args.shape, args.rounds, args.steps = "toy", 1, 1
    shape = SHAPES[args.shape]
    print(f"{args.shape}: {shape}, {len(os.sched_getaffinity(0))} cores", flush=True)
    workers = contestants(args)
    for _ in range(args.rounds):
        for worker in workers:
            worker.turn()
    for worker in workers:
        worker.end()
    print(table(workers, shape.batch * shape.length, args.steps))
    return None


def _number(text):
    return int(text) if text.isdigit() else text


if __name__ == "__main__":
    main()

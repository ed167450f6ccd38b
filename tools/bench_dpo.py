"""Steps of DPO and of fine-tuning beside TRL's trainers on torch: pairs a second, and memory.

    python tools/bench_dpo.py               # beside TRL if it is installed here
    python tools/bench_dpo.py --length=512 --pairs=8 --rounds=9

A Llama with random weights of the shape of bench_train, tied embeddings, float32, AdamW, gradients
clipped by their global norm. Every text is `--length` tokens long, the second half of them the
response: how texts of unlike lengths are laid out is another question. DPO reads both texts of each
pair in one batch, with the reference live or its log-probabilities given; fine-tuning reads the
same texts as rows. TRL's trainers collate and compute the loss; the rest of its step is plain torch
(backward, clipping, fused AdamW), gradient checkpointing off. Ours is the step of `jaxlm.train`,
with all logits at one time; with `--chunk=512` it holds those of so many tokens, and DPO, unlike
fine-tuning, then computes them twice.

Each contestant has a process of its own with our memory settings; they take turns and never run at
the same time. A ratio is the median over the rounds of one turn's time against the other's in the
same round, with the least and the largest; processor seconds say more where others use the machine
too. Memory is the most that the process held during its turns, compilation apart; "temporary" is
what XLA plans for the step beside parameters, moments and batch.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

from bench_train import SHAPES, Shape, llama
from peers import Worker, serve

KINDS = {"sft": "fine-tuning", "live": "DPO", "precomputed": "DPO, precomputed"}
EVERY = 64  # steps between two mixes of a reference that follows
BETA = 0.1


def words(shape: Shape, pairs: int):
    """Ids of both texts of each pair, [P, 2, L + 1]: the second half is the response."""
    import numpy as np

    found = np.random.default_rng(0).integers(1, shape.vocabulary, (pairs, 2, shape.length + 1))
    half = shape.length // 2
    found[:, 1, :half] = found[:, 0, :half]
    return found


# The two sides: each returns a function of (steps) that takes them and waits, and facts.


def jax_side(shape: Shape, kind: str, pairs: int, chunk: int):
    """Our step as `train` builds it, for one device."""
    import jax
    import numpy as np

    from jaxlm.contract import compose
    from jaxlm.methods.dpo import dpo
    from jaxlm.methods.follow import follow
    from jaxlm.methods.next_token import next_token
    from jaxlm.models.transformer import DecoderConfig, decoder
    from jaxlm.optim import OptimizerSpec, build
    from jaxlm.step import init_state, make_between, make_step

    model = dataclasses.asdict(shape)
    del model["batch"], model["length"]
    lm = decoder(DecoderConfig(loss_chunk=chunk, **model), "cpu")
    tx, _ = build(OptimizerSpec(name="adamw", learning_rate=1e-5), 1000, lm.axes)
    following = compose(dpo(beta=BETA), follow(every=1))
    method = {
        "sft": next_token,
        "live": lambda: following,
        "precomputed": lambda: dpo(beta=BETA, reference="precomputed"),
    }[kind]()
    state = jax.jit(lambda key: init_state(lm.init(key), method, tx))(jax.random.key(0))
    ids = words(shape, pairs)
    ones = np.ones(ids[..., 1:].shape, np.int32)
    batch = {
        "tokens": ids[..., :-1].astype(np.int32),
        "targets": ids[..., 1:].astype(np.int32),
        "weights": (np.arange(1, shape.length + 1) >= shape.length // 2) * ones.astype(np.float32),
        "segments": ones,
        "positions": ones.cumsum(axis=-1, dtype=np.int32) - 1,
    }
    if kind == "sft":
        batch = {name: x.reshape(-1, shape.length) for name, x in batch.items()}
    batch = jax.device_put(batch)
    for column in method.columns.values():
        batch |= jax.jit(functools.partial(column.fn, lm))(state.params, batch)
    key = jax.random.key(1)
    compiled = make_step(lm, method, tx).lower(state, batch, key).compile()
    between = make_between(method)

    def turn(request):
        nonlocal state
        for _ in range(request["steps"]):
            state, metrics = compiled(state, batch, key)
            metrics["loss"].block_until_ready()
        for n in range(request["mixes"]):
            state = jax.block_until_ready(between(n, state))
        return {}

    megabytes = compiled.memory_analysis().temp_size_in_bytes / 1e6
    return turn, {"about": f"jax {jax.__version__}", "temporary": megabytes}


def trl_side(shape: Shape, kind: str, pairs: int, chunk: int):
    """TRL's trainer for the loss, and a plain step of torch around it."""
    del chunk
    os.environ["HF_HUB_OFFLINE"] = os.environ["TQDM_DISABLE"] = "1"
    import logging
    import warnings

    warnings.filterwarnings("ignore")
    import datasets
    import torch
    import transformers
    import trl
    from tokenizers import Tokenizer, models, pre_tokenizers

    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    backend = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "a": 2}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", pad_token="<pad>"
    )
    common = {
        "output_dir": tempfile.mkdtemp(),
        "max_length": shape.length + 1,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "report_to": "none",
    }
    half, ids = shape.length // 2, words(shape, pairs).tolist()
    small = {"prompt": "a", "completion": " a", "chosen": " a", "rejected": " a a"}
    model = llama(shape)
    if kind == "sft":
        kept = {name: [small[name]] for name in ("prompt", "completion")}
        make, config = trl.SFTTrainer, trl.SFTConfig(**common)
        rows = [
            {"input_ids": text, "labels": [-100] * half + text[half:]}
            for two in ids
            for text in two
        ]
        more = {}
    else:
        kept = {name: [small[name]] for name in ("prompt", "chosen", "rejected")}
        once = kind == "precomputed"
        make = trl.DPOTrainer
        config = trl.DPOConfig(beta=BETA, precompute_ref_log_probs=once, **common)
        rows = [
            {"prompt_ids": a[:half], "chosen_ids": a[half:], "rejected_ids": b[half:]}
            for a, b in ids
        ]
        if once:
            rows = [row | {"ref_chosen_logps": -9.0, "ref_rejected_logps": -9.0} for row in rows]
        more = {} if once else {"ref_model": llama(shape)}
    with contextlib.redirect_stdout(sys.stderr):
        trainer = make(
            model=model,
            args=config,
            train_dataset=datasets.Dataset.from_dict(kept),
            processing_class=tokenizer,
            **more,
        )
    batch = trainer.data_collator(rows)
    assert batch["input_ids"].shape == (2 * pairs, shape.length + 1)
    model.train()
    adam = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.1, fused=True)

    def turn(request):
        for _ in range(request["steps"]):
            adam.zero_grad(set_to_none=True)
            loss = trainer.compute_loss(model, trainer._prepare_inputs(dict(batch)))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adam.step()
            loss.item()
        return {}

    return turn, {"about": f"trl {trl.__version__}, torch {torch.__version__}"}


SIDES = {"jax": jax_side, "trl": trl_side}


def work(args):
    """A worker: builds and warms up one contestant, then takes turns."""
    job = json.loads(args.worker)
    shape = dataclasses.replace(SHAPES[args.shape], length=args.length)
    began = time.perf_counter()
    turn, about = SIDES[job["side"]](shape, job["kind"], args.pairs, args.chunk)
    turn({"steps": 2, "mixes": int(job["side"] == "jax")})
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew

    def answer(request):
        return {**turn(request), "memory": most_memory()}

    serve({**about, "seconds": time.perf_counter() - began}, answer)


def most_memory() -> float:
    """MB that this process has held, at most."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    (peak,) = (line.split()[1] for line in lines if line.startswith("VmHWM"))
    return int(peak) * 1024 / 1e6


def contestant(name, python, job, args) -> Worker:
    flags = (f"--{key}={getattr(args, key)}" for key in ("shape", "length", "pairs", "chunk"))
    worker = Worker(name, __file__, python, job, *flags)
    print(
        f"{name:24} {worker.ready['about']}, ready in {worker.ready['seconds']:.1f} s", flush=True
    )
    return worker


def ratio(ours: Worker, theirs: Worker) -> str:
    """How many times as fast: median, least and largest over the rounds."""
    each = [b["wall"] / a["wall"] for a, b in zip(ours.turns, theirs.turns, strict=True)]
    return f"{statistics.median(each):.2f} ({min(each):.2f}–{max(each):.2f})"


def table(ours: dict[str, Worker], theirs: dict[str, Worker], args) -> str:
    lines = [
        f"\n{'':24}{'ms/step':>9}{'pairs/s':>9}{'tokens/s':>10}{'cpu s/step':>12}{'peak, MB':>10}"
        f"{'temporary':>11}  times as fast as TRL"
    ]
    for workers in (ours, theirs):
        for kind, worker in workers.items():
            seconds = statistics.median(turn["wall"] for turn in worker.turns) / args.steps
            rate = "" if kind == "sft" else f"{args.pairs / seconds:.2f}"
            line = f"{worker.name:24}{seconds * 1e3:9,.0f}{rate:>9}"
            line += f"{2 * args.pairs * args.length / seconds:10,.0f}"
            line += f"{min(turn['cpu'] for turn in worker.turns) / args.steps:12.3f}"
            line += f"{max(turn['memory'] for turn in worker.turns):10,.0f}"
            line += f"{worker.ready.get('temporary', ''):>11{',.0f' if workers is ours else ''}}"
            if workers is ours and kind in theirs:
                line += f"  {ratio(worker, theirs[kind])}"
            lines.append(line)
    return "\n".join(lines)


def following(worker: Worker, steps: int) -> str:
    """What it costs to let the reference follow; the best of some turns."""
    step = statistics.median(turn["wall"] for turn in worker.turns) / steps
    mix = min(worker.turn({"steps": 0, "mixes": 5})["wall"] / 5 for _ in range(3))
    share = mix / (EVERY * step)
    return f"a mix of the reference: {mix * 1e3:.1f} ms, {share:.2%} of the time at every={EVERY}"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="base")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--length", type=int, default=256, help="tokens of a text")
    parser.add_argument("--pairs", type=int, default=4, help="of one step")
    parser.add_argument("--chunk", type=int, default=0, help="tokens whose logits we hold; 0: all")
    found = all(importlib.util.find_spec(name) for name in ("torch", "trl"))
    own = sys.executable if found else ""
    parser.add_argument("--trl", default=own, help="a Python that has torch and trl")
    parser.add_argument("--steps", type=int, default=1, help="of one turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="toy shape, one round")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        return work(args)
    if args.quick:
        args.shape, args.length, args.pairs, args.rounds = "toy", 16, 2, 1
    cores = len(os.sched_getaffinity(0))
    print(f"{args.shape}: {args.pairs} pairs of {args.length} tokens, {cores} cores", flush=True)
    ours, theirs = {}, {}
    for kind in args.kinds.split(","):
        name = KINDS[kind]
        ours[kind] = contestant(name, sys.executable, {"side": "jax", "kind": kind}, args)
        if args.trl:
            job = {"side": "trl", "kind": kind}
            theirs[kind] = contestant(f"TRL {name}", args.trl, job, args)
    workers = [*ours.values(), *theirs.values()]
    for _ in range(args.rounds):
        for worker in workers:
            worker.turn({"steps": args.steps, "mixes": 0})
    print(table(ours, theirs, args))
    if {"sft", "precomputed"} <= ours.keys():
        print(f"precomputed as fast as fine-tuning: {ratio(ours['precomputed'], ours['sft'])}")
    if "live" in ours:
        print(following(ours["live"], args.steps))
    for worker in workers:
        worker.end()
    return None


if __name__ == "__main__":
    main()

"""Tokens/s of generation beside Hugging Face's `generate` on torch, on this machine.

    python tools/bench_generate.py               # beside torch if it is installed here
    python tools/bench_generate.py --batches=1 --dtypes=float32 --new=512

A Llama with random weights of the shape of bench_train, greedy, all prompts of one length, as many
new tokens each; no text is decoded on either side. Both run with our memory settings
(`host/hugepages.py`) on all cores, each in a process of its own; they take turns and never run at
the same time. A turn generates one token and then all of them: the time to the first token is that
of the first, prefill reads the prompts in it, and decoding is the difference. A ratio is the median
over the rounds of one turn's time against the other's in the same round.

The limit is what the memory allows at a batch of 1, where each token reads all weights once: their
bytes by the rate at which a plain sum reads as many, with a thread for each core.
"""

import argparse
import functools
import importlib.util
import json
import os
import pathlib
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

from bench_train import SHAPES, Shape, llama
from peers import Worker, serve

# The two contestants: each returns (rows of prompts, new tokens) -> None, and its weights' bytes.


def jax_side(shape: Shape, dtype: str, context: int):
    """Our generator on one device."""
    import dataclasses

    import jax

    from jaxlm.generate.engine import Generator, Request
    from jaxlm.generate.sampling import Sampling
    from jaxlm.models.transformer import DecoderConfig, decoder

    model = dataclasses.asdict(shape)
    del model["batch"], model["length"]
    lm = decoder(DecoderConfig(dtype=dtype, param_dtype=dtype, **model), "cpu")
    params = jax.jit(lm.init)(jax.random.key(0))
    generator = Generator(lm, context, lambda ids: "", ())
    greedy = Sampling(temperature=0)

    def generate(prompts, new):
        found = generator(params, [Request(ids, new) for ids in prompts], greedy)
        assert all(len(result.ids) == new for result in found)

    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    return generate, weights, f"jax {jax.__version__}"


def torch_side(shape: Shape, dtype: str, context: int):
    """Hugging Face's Llama and its `generate`."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    model = llama(shape).to(getattr(torch, dtype)).eval()
    model.config.use_cache = True
    model.config.max_position_embeddings = context

    def generate(prompts, new):
        ids = torch.tensor(prompts)
        length = {"min_new_tokens": new, "max_new_tokens": new}
        with torch.inference_mode():
            found = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                use_cache=True,
                pad_token_id=0,
                eos_token_id=None,
                **length,
            )
        assert found.shape[1] == len(prompts[0]) + new

    weights = sum(p.nbytes for p in model.parameters())
    return generate, weights, f"torch {torch.__version__}"


SIDES = {"jax": jax_side, "torch": torch_side}


def work(args):
    """A worker: builds its side; a turn is generating in so many rows so many new tokens."""
    import numpy as np

    job = json.loads(args.worker)
    shape = SHAPES[args.shape]
    generate, weights, about = SIDES[job["side"]](shape, job["dtype"], args.prompt + args.new)

    @functools.cache
    def prompts(rows):
        words = np.random.default_rng(0).integers(0, shape.vocabulary, (rows, args.prompt))
        return words.tolist()

    def turn(request):
        rows, new = request
        generate(prompts(rows), new)
        return {}

    serve({"about": about, "weights": weights}, turn)


def contestant(name, python, job, args) -> Worker:
    flags = f"--shape={args.shape}", f"--prompt={args.prompt}", f"--new={args.new}"
    worker = Worker(name, __file__, python, job, *flags)
    weights = worker.ready["weights"] / 1e6
    print(f"{name:16} {worker.ready['about']}, {weights:.0f} MB of weights", flush=True)
    return worker


def bandwidth(size: int) -> float:
    """Bytes/s of a plain sum over that many bytes, split among all cores; the best of ten."""
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np

    threads = len(os.sched_getaffinity(0))
    parts = np.array_split(np.ones(size // 4, np.float32), threads)
    times = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(10):
            began = time.perf_counter()
            list(pool.map(np.sum, parts))
            times.append(time.perf_counter() - began)
    return size / min(times)


def compare(workers: list[Worker], rows: int, args) -> list[str]:
    """The lines of a table: each contestant at one batch, and its ratio to torch's."""
    seconds_of = lambda worker, new: worker.turn([rows, new])["wall"]
    for worker in workers:  # compiles
        seconds_of(worker, 1)
        seconds_of(worker, args.new)
    first, decode = {w: [] for w in workers}, {w: [] for w in workers}
    for _ in range(args.rounds):
        for worker in workers:
            first[worker].append(seconds_of(worker, 1))
            decode[worker].append(seconds_of(worker, args.new) - first[worker][-1])
    lines = []
    for worker in workers:
        seconds = statistics.median(first[worker])
        step = statistics.median(decode[worker]) / (args.new - 1)
        line = f"{worker.name:16}{rows:6}{seconds * 1e3:12.1f}{rows * args.prompt / seconds:12,.0f}"
        line += f"{rows / step:12,.0f}{step * 1e3:10.2f}"
        weights = worker.ready["weights"]
        limit = weights / bandwidth(weights)
        line += f"{step / limit:9.1f}"
        for other in workers:
            if other.name == f"torch {worker.name}":
                ratios = [
                    statistics.median(b / a for a, b in zip(t[worker], t[other], strict=True))
                    for t in (first, decode)
                ]
                line += f"  {ratios[0]:.2f} first token, {ratios[1]:.2f} decoding"
        lines.append(line)
    return lines


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="base")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=64, help="new tokens of each row")
    own = sys.executable if importlib.util.find_spec("torch") else ""
    parser.add_argument("--torch", default=own, help="a Python that has torch and transformers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="toy shape, one round")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        return work(args)
    if args.quick:
        args.shape, args.rounds, args.batches, args.new = "toy", 1, "1,2", 8
    print(f"{args.shape}: {SHAPES[args.shape]}, {len(os.sched_getaffinity(0))} cores")
    print(f"prompts of {args.prompt} tokens, {args.new} new ones", flush=True)
    head = f"\n{'':16}{'rows':>6}{'first, ms':>12}{'prefill/s':>12}{'decode/s':>12}{'ms/step':>10}"
    head += f"{'× limit':>9}  times as fast as torch"
    print(head)
    for dtype in args.dtypes.split(","):
        workers = [contestant(dtype, sys.executable, {"side": "jax", "dtype": dtype}, args)]
        if args.torch:
            job = {"side": "torch", "dtype": dtype}
            workers.append(contestant(f"torch {dtype}", args.torch, job, args))
        for rows in args.batches.split(","):
            print("\n".join(compare(workers, int(rows), args)), flush=True)
        for worker in workers:
            worker.end()
    return None


if __name__ == "__main__":
    main()

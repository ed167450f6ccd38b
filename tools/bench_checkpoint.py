"""How long the loop stands still at an asynchronous save, and how long a restore takes.

    python tools/bench_checkpoint.py --width=128 --layers=4 --vocabulary=4096

A state with AdamW's moments is trained by a step of real matrix products on all cores, donated as
in the loop, and saved every few steps. Blocked: the time `save` takes to return. Slowed: what the
steps after it lose to the threads that write and hash, which on a CPU share its cores.
"""

import argparse
import pathlib
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlm.checkpoint import Checkpoints


def make_state(width, layers, vocabulary):
    """Params of a decoder's shapes, and an AdamW state."""
    kernels = {"query": width, "key": width, "value": width, "output": width}
    kernels |= {"gate": 3 * width, "up": 3 * width}
    block = {name: jnp.ones((width, units)) for name, units in kernels.items()}
    block["down"] = jnp.ones((3 * width, width))
    blocks = {str(i): block for i in range(layers)}
    params = {"table": jnp.ones((vocabulary, width)), "blocks": blocks}
    params = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), params)
    return {"params": params, "opt_state": optax.adamw(1e-3).init(params)}


def make_step(milliseconds):
    """A donated step on the state that takes about that long, by repeated matrix products."""
    side = jnp.ones((768, 768)) / 768

    @jax.jit
    def products(count):
        return jax.lax.fori_loop(0, count, lambda i, x: x @ side, side)

    def seconds(count):
        start = time.perf_counter()
        products(count).block_until_ready()
        return time.perf_counter() - start

    seconds(1)
    count = max(round(20 * milliseconds / 1000 / min(seconds(20) for _ in range(5))), 1)

    def step(state):
        bump = products(count)[0, 0] * 0
        return jax.tree.map(lambda x: (x + bump).astype(x.dtype), state)

    return jax.jit(step, donate_argnums=0)


def timed(fn, *args):
    start = time.perf_counter()
    result = jax.block_until_ready(fn(*args))
    return result, (time.perf_counter() - start) * 1000


def measure(options, directory):
    state, step = make_state(options.width, options.layers, options.vocabulary), None
    step = make_step(options.step_ms)
    state, _ = timed(step, state)
    plain, after, blocked, written = [], [], [], []
    with Checkpoints(directory) as checkpoints:
        for number in range(1, options.saves + 1):
            for i in range(2 * options.every):
                state, took = timed(step, state)
                (plain if i >= options.every else after if number > 1 else []).append(took)
            start = time.perf_counter()
            blocked.append(timed(checkpoints.save, number, state, {"position": number})[1])
            if number == options.saves:
                checkpoints.wait()
                written.append((time.perf_counter() - start) * 1000)
        abstract = jax.eval_shape(lambda: state)
        _, verify = timed(checkpoints.steps)
        _, first = timed(checkpoints.restore, options.saves, abstract)
        _, again = timed(checkpoints.restore, options.saves, abstract)
    parameters = sum(x.size for x in jax.tree.leaves(state["params"]))
    megabytes = sum(x.nbytes for x in jax.tree.leaves(state)) / 1e6
    slowed = (np.mean(after) - np.mean(plain)) * options.every
    return {
        "parameters, millions": parameters / 1e6,
        "state, MB": megabytes,
        "step, ms (median)": np.median(plain),
        "save blocks, ms (median)": np.median(blocked),
        "save blocks, ms (worst)": np.max(blocked),
        "share of a step (median)": np.median(blocked) / np.median(plain),
        f"slowed, ms over {options.every} steps after": slowed,
        "save to digest, ms (no step beside it)": written[0],
        "verify the kept ones, ms": verify,
        "restore, ms (first, compiles the copy)": first,
        "restore, ms (again)": again,
    }


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--step_ms", type=float, default=150, help="length of the simulated step")
    parser.add_argument("--every", type=int, default=5, help="steps counted after each save")
    parser.add_argument("--saves", type=int, default=8)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        for name, value in measure(options, directory).items():
            print(f"{name:<45}{value:>10.2f}")


if __name__ == "__main__":
    main()

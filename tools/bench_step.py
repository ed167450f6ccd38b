"""What the training step costs beside its arithmetic: dispatch, and time to a second start.

    python tools/bench_step.py

Dispatch: the quickstart's model, optimizer and step, but so narrow that arithmetic takes next to no
time; the median of a call until its result is there is then an upper bound. A step compiled by the
run and one through `jax.jit` are both shown.
"""

import importlib.util
import pathlib
import statistics
import sys
import time

import jax
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from jaxlm.build import build  # noqa: E402
from jaxlm.config import check  # noqa: E402

CALLS = 200


def narrow_quickstart():
    """The quickstart's recipe at width 8, on 4 tokens."""
    path = ROOT / "configs" / "quickstart.py"
    spec = importlib.util.spec_from_file_location("quickstart", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    c = module.get_config()
    c.model.update(width=8, heads=2, ffn_width=8, loss_chunk=0)
    c.batch, c.data.length = 2, 2
    return check(c)


def milliseconds(step, state, batch):
    """Median time of a call until its metrics are there."""
    key, found = jax.random.key(0), []
    for _ in range(CALLS):
        begin = time.perf_counter()
        state, metrics = step(state, batch, key)
        jax.block_until_ready(metrics)
        found.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(found), state


def main():
    run = narrow_quickstart()
    built = build(run, 16)
    rows = np.ones((run.rows, run.data.length), np.int32)
    names = ("tokens", "targets", "segments", "positions")
    batch = dict.fromkeys(names, rows) | {"weights": rows.astype(np.float32)}
    batch |= {"source": rows[:, 0], "index": rows[:, 0]}
    with jax.set_mesh(built.mesh):
        step, _ = built.step()
        state, batch = built.first_state(), built.put(batch)
        leaves = len(jax.tree.leaves(state))
        compiled = step.lower(state, batch, jax.random.key(0)).compile()
        _, state = milliseconds(compiled, state, batch)
        rows = []
        for name, call in (("compiled, as the run calls it", compiled), ("through jax.jit", step)):
            once, state = milliseconds(call, state, batch)
            rows.append((name, once))
    print(f"a step of {leaves} arrays, jax {jax.__version__}, median of {CALLS} calls")
    for name, once in rows:
        print(f"  {name:32s} {once:6.2f} ms")


if __name__ == "__main__":
    main()

"""A process that runs one step on eight CPU devices and prints what it held, next to the plan.

    python tests/plan/measure.py

Held is what the arrays that enter the step occupy, and by how much the process's peak of resident
memory rises above them while it runs (Linux; the peak is reset before).
"""

import ctypes
import gc
import json
import pathlib
import re
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax
import tiny

from jaxlm.build import build
from jaxlm.config import check
from jaxlm.plan.program import compile_step
from jaxlm.plan.topology import resolve


def resident(which):
    """Bytes: VmRSS now, VmHWM at most since the last reset."""
    text = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(rf"{which}:\s+(\d+) kB", text).group(1)) * 1024


def main():
    jax.config.update("jax_num_cpu_devices", 8)
    c = tiny.get_config()
    c.batch, c.data.length = 32, 128
    c.model.update(width=256, layers=4, heads=4, ffn_width=1024, vocabulary=2048, scan_layers="on")
    built = build(check(c), 2048, jax.devices())
    topology = resolve("cpu:8")
    planned = compile_step(built, topology).peak * 8
    with jax.set_mesh(built.mesh):
        step, _ = built.step()
        shapes = built.abstract_batch()
        batch = {
            k: jax.device_put(jax.numpy.ones(v.shape, v.dtype), v.sharding)
            for k, v in shapes.items()
        }
        state, key = built.first_state(), jax.random.key(0)
        state, metrics = step(state, batch, key)
        jax.block_until_ready((state, metrics))
        del metrics
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        arrays = jax.tree.leaves((state, batch))
        held = sum(s.data.nbytes for x in arrays for s in x.addressable_shards)
        pathlib.Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        jax.block_until_ready(step(state, batch, key))
        rise = resident("VmHWM") - before
    print(json.dumps({"planned": planned, "arrays": held, "rise": rise, "measured": held + rise}))


if __name__ == "__main__":
    main()

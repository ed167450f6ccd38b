"""A step's collectives and memory traffic from shapes alone, for ranking and for scaling up.

Of n devices along a mesh axis each sends (n - 1)/n of what is gathered or scattered, and twice that
of what is all-reduced. With P kernel numbers of s bytes each, per micro-batch:

    fsdp      weights gathered for each of the two passes and gradients scattered: 3·P·s / tensor
    tensor    the outputs of attention and feed-forward, [tokens, width] of each block, summed in
              both passes, and in a recomputed one
    sequence  keys and values passed round for both passes, three times in all with their gradients
    data      gradients of a shard all-reduced: P·s / (fsdp · tensor)

With whole experts over fsdp their kernels do not travel; the tokens of all its devices do, five
times in all: gathered for both passes, outputs scattered, and the same of gradients.

Traffic is counted in passes over a block's activations (`PASSES`, fitted to compiled programs) and
over the optimizer's state.
"""

import math
from typing import NamedTuple

from jaxlm.models.options import resolve
from jaxlm.plan.memory import block_kernels, feed_forward, share_of_one
from jaxlm.specs import Run

PASSES = 12  # reads and writes of each number of a block's activations, in a step


class Sent(NamedTuple):
    """Bytes that one device sends in a step along each mesh axis."""

    data: float
    fsdp: float
    sequence: float
    tensor: float


def parameters(run: Run) -> tuple[int, int]:
    """Numbers in the kernels of all blocks, and in embedding and head."""
    model = resolve(run.model, "cpu")
    ends = model.width * model.vocabulary * (1 if model.tied else 2)
    return model.layers * block_kernels(model), ends


def sent(run: Run, sizes: dict[str, int]) -> Sent:
    model, rows, length = share_of_one(run, sizes)
    size = 4 if model.dtype == "float32" else 2
    kernels = sum(parameters(run)) * size
    part = {axis: (n - 1) / n for axis, n in sizes.items()}
    data = 2 * kernels / (sizes["fsdp"] * sizes["tensor"]) * part["data"]
    activations = rows * length * model.width * size
    fsdp = 3 * kernels / sizes["tensor"] * part["fsdp"]
    if model.experts_over == "fsdp":
        fsdp -= 3 * model.layers * feed_forward(model) * size * (sizes["fsdp"] - 1)
        fsdp += 5 * model.layers * activations * (sizes["fsdp"] - 1)
    sums = 4 if model.remat == "none" else 5
    tensor = 2 * sums * model.layers * activations * part["tensor"]
    keys = 2 * rows * length * model.kv_heads * model.head_width * size
    sequence = 3 * model.layers * keys * (sizes["sequence"] - 1)
    return Sent(*(run.accumulate * each for each in (data, fsdp, sequence, tensor)))


def traffic(run: Run, sizes: dict[str, int]) -> float:
    """Bytes of memory traffic of one device apart from matrix products."""
    model, rows, length = share_of_one(run, sizes)
    size = 4 if model.dtype == "float32" else 2
    inner = model.ffn_width * (model.experts_per_token if model.experts else 1)
    if model.experts_over:  # of each token all experts that it chose, wherever they are
        whole = resolve(run.model, "cpu")
        inner = whole.ffn_width * whole.experts_per_token / sizes["tensor"]
    wide = 2 * model.width + 2 * model.heads * model.head_width + 2 * inner
    block = rows * length * model.layers * wide * size * PASSES
    state = 28 * sum(parameters(run)) / (sizes["fsdp"] * sizes["tensor"])
    logits = 4 * 6 * rows * length * model.vocabulary
    return run.accumulate * (block + logits) + state


def spread(sizes: dict[str, int]) -> str:
    return " × ".join(f"{axis} {n}" for axis, n in sizes.items() if n > 1) or "one device"


def factors(devices: int, most: int) -> list[int]:
    """Powers of two up to `most` that divide `devices`."""
    powers = (2**i for i in range(int(math.log2(max(most, 1))) + 1))
    return [n for n in powers if devices % n == 0]

"""Running out of a device's memory, as XLA says it: while it compiles (a TPU), or later (all).

Nothing here imports JAX: an exception is known by the name of its type and by its words.
"""

import re
from typing import NamedTuple

from jaxlm.host import hardware

# "... Used 20.15G of 15.75G hbm" of the TPU's compiler, or "... temporaries (101.71G) exceeds
# available HBM (95.74G)".
SIZES = re.compile(
    r"(?:[Uu]sed |\()([\d.]+)([KMGT])(?: of |\) exceeds available HBM \()([\d.]+)([KMGT])"
)
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# Memory on the chip that a kernel works in: no batch is too large there.
INSIDE = re.compile(r"memory space (?:vmem|smem|sflag)")


class Sizes(NamedTuple):
    """Bytes of one device."""

    needs: float
    has: float


def ran_out(error: BaseException) -> bool:
    """Whether that is what an exception says."""
    text = str(error)
    if type(error).__name__ not in ("JaxRuntimeError", "XlaRuntimeError") or INSIDE.search(text):
        return False
    # Messages between hosts may be "exhausted" too, by their length; and a step that was dispatched
    # but not begun fails with "INTERNAL: Error dispatching computation: Out of memory ...".
    exhausted = "RESOURCE_EXHAUSTED" in text and re.search("memory|alloc", text, re.IGNORECASE)
    return bool(exhausted or re.search("out of memory", text, re.IGNORECASE))


def sizes(error: BaseException) -> Sizes | None:
    """What the program needs and what there is, where the compiler tells."""
    found = SIZES.search(str(error))
    if not found or not ran_out(error):
        return None
    in_bytes = lambda number, unit: float(number) * UNITS[unit]
    return Sizes(in_bytes(*found.group(1, 2)), in_bytes(*found.group(3, 4)))


def sentence(error: BaseException, remedy: str) -> str:
    """What to tell the user, with XLA's own first words."""
    said = " ".join(str(error).split("\n")[0].split())[:200]
    beside = "; nvidia-smi tells whether other programs hold some" if hardware.nvidia_gpu() else ""
    return f"a device's memory is too small for this ({said}){beside}; {remedy}"

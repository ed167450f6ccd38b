"""What the accelerators we know can do, as published: one table for MFU, planning and roofline.

FLOP/s are dense bfloat16. Bandwidths are those of one chip: `memory` of its HBM; `link` what it can
send to its neighbours over all its links together, in one direction (half of the figures that data
sheets call bidirectional); `network` its share of its host's cards into the data center. `torus`:
dimensions of the grid that the links make, 0 = a switch between all; `joined`: chips that the links
join at most.

Sources, read in November 2026. TPU: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}; the network of
v5e and v6e is that of a pod divided by its 256 chips, v4's is taken to be v5p's (not published).
v4's links are those of its paper (arXiv 2304.01433): six of 50 GB/s. NVIDIA: the data sheets of
A100 80GB, H100, H200 and DGX B200, SXM, without sparsity; the network is one card a GPU as in the
DGX systems, 200 Gb/s for the A100 and 400 Gb/s for the others.
"""

from typing import NamedTuple

# A TPU's gigabytes are binary (its compiler has 15.75 of a v5e's 16 to give), a GPU's decimal.
# A device belongs to the first row one of whose kinds its `device_kind` starts with, in lower case.
TABLE = """
# name     TFLOP/s  memory GB  GB/s  link GB/s  network GB/s  torus  joined  device_kind
v6e            918         32  1600        400        12.5        2     256  tpu v6 lite | tpu v6e
v5e            197         16   819        200         3.125      2     256  tpu v5 lite | tpu v5e
v5p            459         95  2765        600         6.25       3    6144  tpu v5p | tpu v5
v4             275         32  1200        300         6.25       3    4096  tpu v4
a100           312         80  2039        300        25          0       8  nvidia a100
h100-pcie      756         80  2000         64        25          0       8  nvidia h100 pcie
h100-nvl       835         94  3900        300        25          0       2  nvidia h100 nvl
h100           989         80  3350        450        50          0       8  nvidia h100
h200           989        141  4800        450        50          0       8  nvidia h200
b200          2250        180  8000        900        50          0       8  nvidia b200
"""


class Chip(NamedTuple):
    name: str  # as topologies call it: "v5e"
    platform: str  # "tpu", "gpu" or "cpu"
    kinds: tuple[str, ...]  # starts of `device_kind`
    flops: float  # dense bfloat16 FLOP/s
    memory_bytes: float
    memory: float  # bytes/s
    link: float  # bytes/s
    network: float  # bytes/s
    torus: int
    joined: int


def _read(line: str) -> Chip:
    name, tflops, memory, speed, link, network, torus, joined, kinds = line.split(maxsplit=8)
    tpu = kinds.startswith("tpu")
    return Chip(
        name,
        "tpu" if tpu else "gpu",
        tuple(kind.strip() for kind in kinds.split("|")),
        flops=float(tflops) * 1e12,
        memory_bytes=float(memory) * (2**30 if tpu else 1e9),
        memory=float(speed) * 1e9,
        link=float(link) * 1e9,
        network=float(network) * 1e9,
        torus=int(torus),
        joined=int(joined),
    )


CHIPS = {chip.name: chip for chip in map(_read, TABLE.strip().splitlines()[1:])}


def of_kind(kind: str) -> Chip | None:
    """The chip whose `device_kind` this is, if we know it."""
    return next((chip for chip in CHIPS.values() if kind.lower().startswith(chip.kinds)), None)

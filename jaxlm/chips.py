"""What the accelerators we know can do, as published: one table for MFU, planning and roofline.

FLOP/s are dense bfloat16. Bandwidths are those of one chip: `memory` of its HBM; `link` what it can
send to its neighbours over all its links together, in one direction (half of the figures that data
sheets call bidirectional); `network` its share of its host's cards into the data center; `host` to
the memory of its host or from it, one way. `torus`: dimensions of the grid that the links make, 0 =
a switch between all; `joined`: chips that the links join at most. `fp8`: products of 8-bit floats
(e4m3, e5m2), at twice the rate; MFU stays a share of the bfloat16 peak.

Sources, read in November 2026. TPU: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}; the network of
v5e and v6e is that of a pod divided by its 256 chips, v4's is taken to be v5p's (not published).
v4's links are those of its paper (arXiv 2304.01433): six of 50 GB/s. NVIDIA: the data sheets of
A100 40GB and 80GB, H100, H200 and DGX B200, without sparsity, SXM where nothing else is said; the
network is one card a GPU as in the DGX systems, 200 Gb/s for the A100 and 400 Gb/s for the others.
A GPU's memory is what its driver tells, in the device descriptions of OpenXLA (xla/backends/gpu/
target_config/specs; the H200's as nvidia-smi lists it, 143,771 MiB), rounded down: up to 7 % more
than the data sheet says. The H100 NVL's is the data sheet's. `host` is PCIe: of GPUs 16 lanes of
the fourth generation (A100) or the fifth (the others; the B200 too, whose DGX has processors of no
later one); of TPUs what jax-ml.github.io/scaling-book tells: 16 GB/s for v4, 32 for v6e, else 15.
"""

import re
from typing import NamedTuple

# A TPU's gigabytes are binary (its compiler has 15.75 of a v5e's 16 to give), a GPU's decimal.
# A device belongs to the first row one of whose kinds its `device_kind` starts with, in lower case
# and without "NVIDIA"; a slice of a GPU (MIG) to none, nor does one of that name with other memory.
# GB are those of memory, GB/s its speed; links, network and host are GB/s too.
TABLE = """
# name     TFLOP/s   GB  GB/s  link  network  host  torus  joined  fp8  device_kind
v6e            918   32  1600   400     12.5    32      2     256   no  tpu v6 lite | tpu v6e
v5e            197   16   819   200    3.125    15      2     256   no  tpu v5 lite | tpu v5e
v5p            459   95  2765   600     6.25    15      3    6144   no  tpu v5p | tpu v5
v4             275   32  1200   300     6.25    16      3    4096   no  tpu v4
a100-40        312   42  1555   300       25    32      0       8   no  a100-sxm4-40 | a100-pcie-40
a100           312   85  2039   300       25    32      0       8   no  a100-sxm4-80 | a100 80gb
h100-pcie      756   84  2000    64       25    64      0       8  yes  h100 pcie
h100-nvl       835   94  3900   300       25    64      0       2  yes  h100 nvl
h100           989   84  3350   450       50    64      0       8  yes  h100 80gb
h200-nvl       835  150  4800   450       50    64      0       4  yes  h200 nvl
h200           989  150  4800   450       50    64      0       8  yes  h200
b200          2250  191  8000   900       50    64      0       8  yes  b200
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
    host: float  # bytes/s
    torus: int
    joined: int
    fp8: bool = False  # multiplies 8-bit floats


def _read(line: str) -> Chip:
    name, tflops, memory, *rest = line.split(maxsplit=10)
    speed, link, network, host, torus, joined, fp8, kinds = rest
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
        host=float(host) * 1e9,
        torus=int(torus),
        joined=int(joined),
        fp8=fp8 == "yes",
    )


CHIPS = {chip.name: chip for chip in map(_read, TABLE.strip().splitlines()[1:])}


def is_slice(kind: str) -> bool:
    """Whether that is no whole GPU but a slice of one: "NVIDIA H100 80GB HBM3 MIG 1g.10gb"."""
    return " mig " in f"{kind.lower()} "


def of_kind(kind: str) -> Chip | None:
    """The chip whose `device_kind` this is, if we know it."""
    name = kind.lower().removeprefix("nvidia ")
    known = (chip for chip in CHIPS.values() if name.startswith(chip.kinds))
    return None if is_slice(kind) else next(known, None)


def has_fp8(device) -> bool:
    """Whether a device multiplies 8-bit floats: by the table, or a GPU by what it says of itself.

    Of GPUs those of compute capability 8.9 do, Ada and later.
    """
    chip = of_kind(device.device_kind)
    if chip:
        return chip.fp8
    capability = re.match(r"(\d+)\.(\d+)", str(getattr(device, "compute_capability", "")))
    return bool(capability) and tuple(map(int, capability.groups())) >= (8, 9)


def no_fp8(kind: str) -> str:
    """What to tell who asked for fp8 on a device of this kind."""
    able = ", ".join(chip.name for chip in CHIPS.values() if chip.fp8)
    return (
        f"config.model.quantize='fp8', but a {kind} multiplies no 8-bit floats as far as is known "
        f"here ({able} do, and GPUs of compute capability 8.9 and more); take 'int8' or 'off', or "
        "add its data sheet to jaxlm/chips.py"
    )

"""TPU slices by the names of `jaxlm.plan`, v5e:16x16, and what Google's tools call them."""

import argparse
import math
from typing import NamedTuple

HOST_CHIPS = 4  # of a machine of a slice of several; smaller slices are one machine


class Kind(NamedTuple):
    gke: str  # label cloud.google.com/gke-tpu-accelerator
    type: str  # accelerator type, {} = its number
    cores: int  # that this number counts, for each chip
    axes: int  # of a topology
    runtime: str  # software version of a TPU VM


# cloud.google.com: "Plan TPUs in GKE", "TPU configurations", "TPU software versions"
KINDS = {
    "v4": Kind("tpu-v4-podslice", "v4-{}", 2, 3, "tpu-ubuntu2204-base"),
    "v5e": Kind("tpu-v5-lite-podslice", "v5litepod-{}", 1, 2, "v2-alpha-tpuv5-lite"),
    "v5p": Kind("tpu-v5p-slice", "v5p-{}", 2, 3, "v2-alpha-tpuv5"),
    "v6e": Kind("tpu-v6e-slice", "v6e-{}", 1, 2, "v2-alpha-tpuv6e"),
}


class Slice(NamedTuple):
    kind: Kind
    topology: str  # 16x16
    chips: int

    @property
    def hosts(self) -> int:
        return max(self.chips // HOST_CHIPS, 1)

    @property
    def type(self) -> str:
        return self.kind.type.format(self.chips * self.kind.cores)


def parse(text: str) -> Slice:
    """v5e:16x16 -> a slice; ValueError says what is wrong."""
    name, _, topology = text.partition(":")
    kind, sizes = KINDS.get(name), topology.split("x")
    if kind is None:
        raise ValueError(
            f"{text!r} should be one of {', '.join(KINDS)} and its topology: v5e:16x16"
        )
    if len(sizes) != kind.axes or not all(size.isdecimal() and int(size) for size in sizes):
        example = "x".join(["4"] * kind.axes)
        raise ValueError(f"{text!r}: a topology of {name} looks like {name}:{example}")
    chips = math.prod(map(int, sizes))
    if chips > 1 and chips % HOST_CHIPS:
        raise ValueError(f"{text!r} has {chips} chips, which do not fill machines of {HOST_CHIPS}")
    return Slice(kind, topology, chips)


def argument(text: str) -> Slice:
    """`parse` for a command line."""
    try:
        return parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None

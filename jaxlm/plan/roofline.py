"""How long a step should take: each of its parts at the speed that the hardware allows.

    products      FLOPs / peak, or the traffic of those instructions / memory bandwidth if longer
    the rest      traffic of all other instructions / memory bandwidth
    links         bytes sent within a slice or node / link bandwidth
    network       bytes sent between them / network bandwidth
    host          moments that lie in its host's memory, there and back / host bandwidth

Computing is products and the rest, one after the other. Collectives within a slice are hidden
behind it as far as they fit; those over the network are not, nor are moments, which are fetched
when all gradients are there. The bandwidths are taken at a share that good programs reach
(`REACHED`); the peak is not, so what is told is what the program could reach, and a run that stays
below it has something else to look for.

A torus gives a group all links of the dimensions along which its members differ, half of them where
its members do not close a ring there.
"""

from typing import NamedTuple

import numpy as np

from jaxlm.chips import Chip
from jaxlm.plan.collectives import Collective
from jaxlm.plan.topology import Topology
from jaxlm.plan.traffic import Traffic

REACHED = 0.9  # of every bandwidth
RING = {"v4": 4, "v5p": 4, "v5e": 16, "v6e": 16}  # a dimension of this many chips closes a ring


class Times(NamedTuple):
    """Seconds of a step."""

    products: float
    rest: float
    links: float
    network: float
    host: float = 0.0

    @property
    def computing(self) -> float:
        return self.products + self.rest

    @property
    def step(self) -> float:
        """Collectives within a slice hidden as far as they fit."""
        return max(self.computing, self.links) + self.network + self.host

    @property
    def nothing_hidden(self) -> float:
        return self.computing + self.links + self.network + self.host


def times(
    topology: Topology,
    devices: list,
    flops_of_one: float,
    moved: Traffic,
    sent: list[Collective],
    on_host: float = 0.0,
) -> Times:
    """Times of a step. `devices` in the order of the mesh; `flops_of_one`: what one computes;
    `on_host`: bytes of its moments there."""
    chip = topology.chip
    memory = chip.memory * REACHED
    links = network = 0.0
    for one in sent:
        speed, over_network = bandwidth(topology, [devices[i] for i in one.members])
        seconds = one.total / (speed * REACHED)
        links, network = links + seconds * (not over_network), network + seconds * over_network
    products = max(flops_of_one / chip.flops, moved.with_products / memory)
    return Times(products, moved.without / memory, links, network, of_moments(chip, on_host))


def of_moments(chip: Chip, on_host: float) -> float:
    """Seconds that the moments of a device take from its host's memory and back to it."""
    return 2 * on_host / (chip.host * REACHED)


def bandwidth(topology: Topology, devices: list) -> tuple[float, bool]:
    """Bytes/s that each device of a group can send to it; whether that is over the network."""
    chip = topology.chip
    if chip.torus:
        if len({getattr(d, "slice_index", 0) or 0 for d in devices}) > 1:
            return chip.network, True
        return _of_torus(chip, topology.grid, devices), False
    if chip.joined and len({d.id // chip.joined for d in devices}) > 1:
        return chip.network, True
    return chip.link, False


def _of_torus(chip, grid, devices):
    places = np.array([d.coords for d in devices])[:, : len(grid)]
    share = 0.0
    for along, size in zip(places.T, grid, strict=True):
        used = len(set(along.tolist()))
        ring = used == size and size % RING[chip.name] == 0
        share += (1.0 if ring else 0.5) * (used > 1)
    return chip.link * max(share, 0.5) / chip.torus

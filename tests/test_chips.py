"""Which devices multiply 8-bit floats, and what is said to who asks the others for it."""

import types

import jax
import numpy as np
import pytest
import tiny

from jaxlm import chips, sharding
from jaxlm.build import build
from jaxlm.config import check
from jaxlm.plan import program, topology


def device(kind, **more):
    return types.SimpleNamespace(device_kind=kind, **more)


@pytest.mark.parametrize(
    ("kind", "capability", "has"),
    [
        ("NVIDIA H100 80GB HBM3", "9.0", True),
        ("NVIDIA H100 PCIe", "9.0", True),
        ("NVIDIA B200", "10.0", True),
        ("NVIDIA A100-SXM4-80GB", "8.0", False),
        ("NVIDIA L40S", "8.9", True),  # not in the table
        ("NVIDIA RTX 3090", "8.6", False),
        ("TPU v5 lite", None, False),
        ("TPU v9", None, False),
        ("AMD", "gfx942", False),
    ],
)
def test_who_multiplies_8_bit_floats(kind, capability, has):
    assert chips.has_fp8(device(kind, compute_capability=capability)) == has


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100-PCIE-40GB", "a100-40"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100 80GB PCIe", "a100"),
        ("NVIDIA A100-SXM-64GB", ""),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", ""),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", ""),
        ("NVIDIA H100 64GB HBM2", ""),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H200 NVL", "h200-nvl"),
        ("NVIDIA GH200 480GB", ""),
        ("cpu", ""),
    ],
)
def test_a_device_is_the_chip_of_its_name_and_memory(kind, name):
    assert chips.of_kind(kind) == chips.CHIPS.get(name)


def recipe():
    c = tiny.get_config()
    c.model.update(vocabulary=256, quantize="fp8")
    return check(c)


def test_fp8_is_refused_on_a_chip_without_it(monkeypatch):
    mesh = types.SimpleNamespace(
        devices=np.array([device("NVIDIA A100-SXM4-80GB", platform="gpu")]),
        shape=dict.fromkeys(sharding.MESH_AXES, 1),
    )
    monkeypatch.setattr(sharding, "make_mesh", lambda *_: mesh)
    with pytest.raises(ValueError, match=r"A100.*multiplies no 8-bit floats.*h100.*'int8'"):
        build(recipe(), 256)


def test_fp8_is_planned_only_for_chips_that_have_it():
    """What stands in for a GPU is a CPU, which may."""
    of = lambda name: topology.Topology(name, chips.CHIPS[name], jax.devices(), (), 1, False)
    assert program.plan_run(recipe(), of("h100")).run.model.quantize == "fp8"
    with pytest.raises(ValueError, match="a100 multiplies no 8-bit floats"):
        program.plan_run(recipe(), of("a100"))

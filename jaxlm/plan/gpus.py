"""A GPU's own compiler, asked for GPUs that are not here.

It comes with JAX's CUDA plugin, `pip install "jax[cuda12]"`, and wants to know of a GPU what it
would else ask the GPU: `TABLE`, from the device descriptions of OpenXLA (xla/backends/gpu/
target_config/specs), read in November 2026. Kernels are chosen without trying them out, so a run's
own choices may differ. JAX's default platform has to be the CPU.
"""

import importlib.util
import pkgutil

from jaxlm.chips import Chip

# Capability, multiprocessors, float32 units and shared memory of each, L2 cache, clock, name.
TABLE = """
# name     capability  cores  units  shared kB  L2 MB  GHz    description
a100-40    8.0         108    64     164        40     1.41   NVIDIA A100-SXM4-40GB
a100       8.0         108    64     164        40     1.41   NVIDIA A100-SXM4-80GB
h100-pcie  9.0         114    128    228        50     1.755  NVIDIA H100 PCIe
h100       9.0         132    128    228        50     1.98   NVIDIA H100 80GB HBM3
h200       9.0         132    128    228        50     1.98   NVIDIA H200
b200       10.0        148    128    228        126.5  1.965  NVIDIA B200
"""
ROWS = {line.split()[0]: line.split(maxsplit=7)[1:] for line in TABLE.strip().splitlines()[1:]}
NODE = 8  # GPUs of a host


def compiler_is_here() -> bool:
    """Whether JAX's CUDA plugin is installed."""
    plugins = importlib.util.find_spec("jax_plugins")
    folders = plugins.submodule_search_locations if plugins else None
    return any(m.name.startswith("xla_cuda") for m in pkgutil.iter_modules(folders or []))


def devices(chip: Chip, count: int) -> list:
    """So many GPUs of a kind, to compile for. Raises `ValueError` for what cannot be described."""
    if chip.name not in ROWS:
        raise ValueError(f"{chip.name} is not in the table of jaxlm/plan/gpus.py")
    if count > NODE and count % NODE:
        raise ValueError(f"{count} GPUs are not whole hosts of {NODE}")
    from jax.experimental import topologies

    hosts = max(count // NODE, 1)
    found = topologies.get_topology_desc(
        platform="cuda", target_config=_described(chip), topology=f"1x{hosts}x{count // hosts}"
    )
    return list(found.devices)


def _described(chip):
    """XLA's `GpuTargetConfigProto`, as text."""
    capability, cores, units, shared, cache, clock, name = ROWS[chip.name]
    major, minor = capability.split(".")
    shared_bytes = int(shared) * 1024
    return f"""
        platform_name: "CUDA"
        device_description_str: "{name}"
        dnn_version_info {{ major: 9 minor: 10 }}
        runtime_version {{ major: 12 minor: 9 }}
        gpu_device_info {{
          cuda_compute_capability {{ major: {major} minor: {minor} }}
          core_count: {cores}
          fpus_per_core: {units}
          clock_rate_ghz: {clock}
          l2_cache_size: {int(float(cache) * 2**20)}
          device_memory_size: {int(chip.memory_bytes)}
          memory_bandwidth: {int(chip.memory)}
          shared_memory_per_core: {shared_bytes}
          shared_memory_per_block: 49152
          shared_memory_per_block_optin: {shared_bytes - 1024}
          threads_per_warp: 32
          threads_per_block_limit: 1024
          threads_per_core_limit: 2048
          registers_per_core_limit: 65536
          registers_per_block_limit: 65536
          block_dim_limit_x: 2147483647
          block_dim_limit_y: 65535
          block_dim_limit_z: 65535
        }}
    """

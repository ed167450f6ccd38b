"""Which accelerators this machine has, seen without JAX; and the one that JAX does not use."""

import contextlib
import importlib.util
import os
import sys
from pathlib import Path


def avoid_absent_tpu() -> None:
    """Without a TPU libtpu prints alarming errors before JAX falls back to what is there."""
    if "JAX_PLATFORMS" in os.environ or "PJRT_DEVICE" in os.environ:
        return
    if _has("libtpu") and not (_has("jax_plugins") or tpu_is_here() or nvidia_gpu()):
        os.environ["JAX_PLATFORMS"] = "cpu"


def tpu_is_here() -> bool:
    """Whether a TPU is attached to this machine, or its environment speaks of one."""
    devices = [*Path("/dev").glob("accel*"), *Path("/dev/vfio").glob("[0-9]*")]
    return bool(devices) or any(name.startswith(("TPU_NAME", "TPU_WORKER")) for name in os.environ)


def nvidia_gpu() -> str:
    """The name of the first NVIDIA GPU that programs may use, "NVIDIA GPU" if unknown, or ""."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1", "NoDevFiles"):
        return ""
    for about in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        with contextlib.suppress(OSError):
            for line in about.read_text().splitlines():
                if line.startswith("Model:"):
                    return line.partition(":")[2].strip()
    present = any(os.path.exists(p) for p in ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg"))
    return "NVIDIA GPU" if present else ""


def unused_accelerator(devices) -> str | None:
    """A sentence with the remedy if `devices` are CPUs only and this machine has more to offer."""
    if any(d.platform != "cpu" for d in devices) or "JAX_PLATFORMS" in os.environ:
        return None
    if gpu := nvidia_gpu():
        if _has("jax_plugins"):
            remedy = "python -c \"import jax; jax.devices('cuda')\" tells why (often an old driver)"
        else:
            remedy = f'{sys.executable} -m pip install "jax[cuda12]" lets JAX use it'
        return f"this machine has a GPU ({gpu}), and the run is on the CPU: {remedy}"
    if tpu_is_here() and not _has("libtpu"):
        remedy = f'{sys.executable} -m pip install "jax[tpu]" lets JAX use it'
        return f"this machine seems to have a TPU, and the run is on the CPU: {remedy}"
    return None


def _has(module):
    return importlib.util.find_spec(module) is not None

"""Compiler flags of each kind of accelerator, given to XLA before JAX starts.

Set only where that accelerator is present and JAX can use it; on a CPU nothing happens. A flag that
the user gave, in XLA_FLAGS or LIBTPU_INIT_ARGS, is never changed nor repeated; the user's text
comes last, where it wins. JAXLM_COMPILER_FLAGS=0 switches all of this off.

XLA ends the process on a flag it does not know, and names come and go with versions. So each is
looked up first, in the library that will parse it: a flag's name stands there as a C string of its
own, while the names of removed ones remain only inside a protobuf descriptor, with no zero byte
around them. The answer is kept in the cache, by library. (Looking costs 2 to 110 ms for a name that
is there, up to half a second for one that is not; asking XLA itself takes a process, and 1.2 s.)

The sets are others' advice for large models (sources below); none was measured by us yet.
"""

import contextlib
import importlib.util
import json
import mmap
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from jaxlm.host import hardware

OFF = "JAXLM_COMPILER_FLAGS"
MIB = 2**20


class Flag(NamedTuple):
    name: str
    value: str | int


class Set(NamedTuple):
    variable: str  # of the environment, where the compiler reads them
    flags: tuple[Flag, ...]


SETS = {
    # Overlap of collectives with compute, and collectives as large as a layer of FSDP: NVIDIA's
    # page on GPU performance (docs.nvidia.com/jax-toolbox), MaxText's scripts for H100.
    "gpu": Set(
        "XLA_FLAGS",
        (
            Flag("xla_gpu_enable_latency_hiding_scheduler", "true"),
            Flag("xla_gpu_enable_pipelined_all_gather", "true"),
            Flag("xla_gpu_enable_pipelined_reduce_scatter", "true"),
            Flag("xla_gpu_enable_pipelined_all_reduce", "true"),
            Flag("xla_gpu_enable_while_loop_double_buffering", "true"),
            Flag("xla_gpu_enable_all_gather_combine_by_dim", "false"),
            Flag("xla_gpu_enable_reduce_scatter_combine_by_dim", "false"),
            Flag("xla_gpu_all_gather_combine_threshold_bytes", 1024 * MIB),
            Flag("xla_gpu_all_reduce_combine_threshold_bytes", 1024 * MIB),
            Flag("xla_gpu_reduce_scatter_combine_threshold_bytes", 128 * MIB),
        ),
    ),
    # Asynchronous collectives fused with compute, and the gradient's all-reduce between slices
    # spread over the backward pass: MaxText's benchmarks/xla_flags_library.py.
    "tpu": Set(
        "LIBTPU_INIT_ARGS",
        (
            Flag("xla_enable_async_all_gather", "true"),
            Flag("xla_enable_async_all_reduce", "true"),
            Flag("xla_tpu_enable_async_collective_fusion", "true"),
            Flag("xla_tpu_enable_async_collective_fusion_fuse_all_gather", "true"),
            Flag("xla_tpu_enable_async_collective_fusion_multiple_steps", "true"),
            Flag("xla_tpu_overlap_compute_collective_tc", "true"),
            Flag("xla_tpu_enable_data_parallel_all_reduce_opt", "true"),
            Flag("xla_tpu_data_parallel_opt_different_sized_ops", "true"),
        ),
    ),
}


def use(cache: Path, platforms: Iterable[str] | None = None) -> list[str]:
    """Sets the flags of the accelerators that are present; returns what to warn of.

    Call it before JAX is imported. `platforms`: of other ones instead, to compile for them ahead
    of time. `cache` is the folder that keeps what each library knows.
    """
    if os.environ.get(OFF) == "0":
        return []
    notes = []
    for platform in present() if platforms is None else platforms:
        found = libraries(platform)
        if not found:
            notes.append(f"no compiler flags for the {platform}: no library found that reads them")
            continue
        wanted = [flag.name for flag in SETS[platform].flags]
        known = known_flags(found, wanted, cache)
        value, dropped = merged(platform, os.environ, known)
        if value is not None:
            os.environ[SETS[platform].variable] = value
        if dropped:
            names = " or ".join(path.name for path in found)
            notes.append(
                f"compiler flags left out, since {names} does not know them: {', '.join(dropped)}"
            )
    return notes


def present() -> list[str]:
    """The platforms that JAX will find here and we have flags for."""
    asked = os.environ.get("JAX_PLATFORMS", "").lower()
    wanted = lambda *names: not asked or any(name in asked for name in names)
    found = []
    if wanted("cuda", "gpu") and hardware.nvidia_gpu() and _plugins():
        found.append("gpu")
    if wanted("tpu") and hardware.tpu_is_here() and libraries("tpu"):
        found.append("tpu")
    return found


def merged(
    platform: str, environ: Mapping[str, str], known: set[str]
) -> tuple[str | None, list[str]]:
    """(the variable's new value, or None to leave it alone; the names that are not known)."""
    given = environ.get(SETS[platform].variable, "").strip()
    if given and not given.startswith("-"):
        return None, []  # the name of a file that holds the flags
    theirs = set(re.findall(r"--?(\w+)", given))
    ours = [flag for flag in SETS[platform].flags if flag.name not in theirs]
    dropped = [flag.name for flag in ours if flag.name not in known]
    text = " ".join(f"--{flag.name}={flag.value}" for flag in ours if flag.name in known)
    return (f"{text} {given}".strip() if text else None), dropped


def libraries(platform: str) -> list[Path]:
    """The files that parse a platform's flags, all of which must know each; [] if one is missing.

    XLA_FLAGS is read by jaxlib for its CPU client too, and by the GPU plugin.
    """
    if platform == "tpu":
        named = os.environ.get("TPU_LIBRARY_PATH", "")
        inside = [folder / "libtpu.so" for folder in _folders("libtpu")]
        return [path for path in [Path(named)] * bool(named) + inside if path.is_file()][:1]
    common = [path for folder in _folders("jaxlib") for path in folder.glob("libjax_common.so")]
    return common + _plugins() if common else []


def _plugins() -> list[Path]:
    """CUDA's plugins: the extra [cuda12] or [cuda13]."""
    found = [p for f in _folders("jax_plugins") for p in f.glob("xla_cuda*/xla_cuda_plugin.so")]
    return sorted(found)


def known_flags(files: list[Path], names: list[str], cache: Path) -> set[str]:
    """Those of the names that every one of the files knows as a flag."""
    known = set(names)
    for file in files:
        about = file.stat()
        kept = cache / f"{file.stem}-{about.st_size}-{about.st_mtime_ns}.json"
        answers: dict[str, bool] = {}
        with contextlib.suppress(OSError, ValueError):
            answers = json.loads(kept.read_text())
        if new := [name for name in names if name not in answers]:
            answers |= _look_up(file, new)
            with contextlib.suppress(OSError):  # a cache that cannot be written costs time only
                kept.parent.mkdir(parents=True, exist_ok=True)
                half = kept.with_suffix(f".{os.getpid()}")
                half.write_text(json.dumps(answers))
                half.replace(kept)
        known &= {name for name in names if answers[name]}
    return known


def _look_up(file, names):
    with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return {name: data.find(f"\0{name}\0".encode()) >= 0 for name in names}


def _folders(module):
    """Where an installed package lies, found without importing it."""
    with contextlib.suppress(ImportError, ValueError):
        if spec := importlib.util.find_spec(module):
            return [Path(folder) for folder in spec.submodule_search_locations or []]
    return []

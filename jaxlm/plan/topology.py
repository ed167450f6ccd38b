"""The devices of a topology that the command line names, whether they are here or not.

v5e:16x16     a slice of TPU chips: their own compiler is asked (libtpu, no TPU needed);
              --slices=2 takes two such slices, joined by the network
gpu           the GPUs of this machine
h100:8        GPUs that are not here: their own compiler is asked (JAX's CUDA plugin, and no GPU);
              without it the program is cut up as for them and compiled for as many CPU devices, and
              its memory is reckoned
cpu:8         as many CPU devices of this process
"""

import contextlib
import difflib
import importlib.util
import math
import os
import re
import sys
import tempfile
from typing import NamedTuple

import jax

from jaxlm.chips import CHIPS, Chip, is_slice, of_kind
from jaxlm.flops import matmul_peak
from jaxlm.host import flags as compiler_flags
from jaxlm.host import gpu_memory, process
from jaxlm.plan import gpus

# The shapes that each TPU is rented in and that its compiler knows, for messages.
SHAPES = {"v4": "4x4x4", "v5e": "16x16", "v5p": "8x8x16", "v6e": "16x16"}


class Topology(NamedTuple):
    name: str
    chip: Chip
    devices: list
    grid: tuple[int, ...]  # chips along each dimension of a TPU slice's torus
    slices: int = 1
    compiled_for_it: bool = True  # else: a stand-in was compiled, and memory is reckoned
    measured: float = 0.0  # bytes of one device for programs, as it says itself; 0: it is not here

    @property
    def platform(self) -> str:
        return self.chip.platform

    @property
    def capacity(self) -> float:
        """Bytes of one device that programs may take."""
        return self.measured or capacity(self.chip)


def names() -> list[str]:
    """One example of each kind of topology."""
    of_tpus = [f"{name}:{SHAPES[name]}" for name in SHAPES if name != "v4"]  # see `_tpu`
    return [
        *of_tpus,
        *(f"{c.name}:8" for c in CHIPS.values() if c.name not in SHAPES),
        "gpu",
        "cpu:8",
    ]


def prepare(name: str) -> None:
    """Before JAX's first use: as many CPU devices as a stand-in takes; a TPU's compiler flags."""
    chip, _, shape = name.partition(":")
    if chip in SHAPES:
        # No metadata server and no lock: nothing is run, so no chip is needed for itself alone.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        jax.config.update("jax_enable_compilation_cache", False)  # which cannot read it back
        process.notes.extend(compiler_flags.use(process.cache_dir() / "flags", ["tpu"]))
    elif chip != "gpu" and shape.isdigit() and int(shape) > 0:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", int(shape))
        if chip in gpus.ROWS and gpus.compiler_is_here():
            jax.config.update("jax_enable_compilation_cache", False)
            process.notes.extend(compiler_flags.use(process.cache_dir() / "flags", ["gpu"]))
            with quiet():  # CUDA's libraries say that there is no driver
                jax.devices()


def resolve(name: str, slices: int = 1) -> Topology:
    """The topology of that name. Raises `ValueError` for one that is not known or not possible."""
    chip, _, shape = name.partition(":")
    if chip in SHAPES and re.fullmatch(r"\d+(x\d+)*", shape):
        return _tpu(CHIPS[chip], shape, slices)
    if slices > 1:
        raise ValueError(f"--slices={slices} is for TPU slices, and {name!r} is none")
    if name == "gpu":
        return _gpus_here()
    if not shape.isdigit() or int(shape) < 1 or chip not in (*CHIPS, "cpu") or chip in SHAPES:
        raise _unknown(name)
    if chip in CHIPS and gpus.compiler_is_here():
        try:
            with quiet():
                return Topology(name, CHIPS[chip], gpus.devices(CHIPS[chip], int(shape)), ())
        except Exception as error:  # ValueError, XlaRuntimeError, ...: it differs by version
            said = str(error).strip().split("\n")[0][:200]
            process.notes.append(f"CPUs stand in for {name}, as JAX's CUDA plugin says: {said}")
    devices = jax.devices("cpu")[: int(shape)]
    if len(devices) < int(shape):
        raise ValueError(f"--topology={name}: only {len(devices)} CPU devices could be made here")
    if chip == "cpu":
        return Topology(name, _cpu(len(devices)), devices, ())
    return Topology(name, CHIPS[chip], devices, (), compiled_for_it=False)


def chip_of(name: str) -> Chip:
    """The accelerator of a topology, without looking for its devices."""
    chip = name.partition(":")[0]
    if chip not in CHIPS:
        raise _unknown(name)
    return CHIPS[chip]


def capacity(chip: Chip) -> float:
    """Bytes of a chip that is not here that programs may take: of a GPU, what JAX asks for."""
    return chip.memory_bytes * (gpu_memory.share() if chip.platform == "gpu" else 1.0)


def _unknown(name):
    near = difflib.get_close_matches(name, names(), 1, 0.5)
    hint = f"; did you mean {near[0]}?" if near else "."
    return ValueError(
        f"there is no topology {name!r}{hint} It can be like one of {', '.join(names())}"
    )


@contextlib.contextmanager
def quiet():
    """Holds back what C++ libraries print on stderr; JAXLM_VERBOSE=1 lets it through."""
    if os.environ.get("JAXLM_VERBOSE", "0") not in ("", "0"):
        yield
        return
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _tpu(chip, shape, slices):
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            f"a plan for {chip.name} needs the TPU's compiler, libtpu, and no TPU: "
            f'{sys.executable} -m pip install "jax[tpu]=={jax.__version__}"'
        )
    from jax.experimental import topologies

    grid = tuple(int(n) for n in shape.split("x"))
    if len(grid) != chip.torus:
        raise ValueError(
            f"--topology={chip.name}:{shape}: {chip.name} chips are joined in {chip.torus} "
            f"dimensions, such as {chip.name}:{SHAPES[chip.name]}"
        )
    more = {"num_slices": slices} if slices > 1 else {}
    try:
        with quiet():
            found = topologies.get_topology_desc(
                platform="tpu", topology_name=f"{chip.name}:{shape}", **more
            )
    except Exception as error:  # XlaRuntimeError, NotImplementedError, ...: it differs by version
        said = str(error).strip().split("\n")[0][:200]
        raise ValueError(f"--topology={chip.name}:{shape}: libtpu refuses it: {said}") from None
    devices = list(found.devices)
    if len(devices) != math.prod(grid) * slices:
        raise ValueError(
            f"--topology={chip.name}:{shape}: libtpu describes the cores of a {chip.name} chip as "
            "devices of their own, which a run does not see; plan for a v5p instead"
        )
    return Topology(f"{chip.name}:{shape}", chip, devices, grid, slices)


def _gpus_here():
    devices = [d for d in jax.devices() if d.platform != "cpu"]
    if not devices:
        raise ValueError(
            "--topology=gpu, but JAX finds no GPU here; name one that is elsewhere, such as h100:8"
        )
    kind = devices[0].device_kind
    if is_slice(kind):
        raise ValueError(
            f"--topology=gpu: {kind} is a slice of a GPU, for which no speeds are published; train "
            "and watch the log's peak_fraction, or plan for whole GPUs, such as h100:8"
        )
    chip = of_kind(kind)
    if chip is None:
        raise ValueError(
            f"--topology=gpu: {kind} is not in the table of jaxlm/chips.py; add its data sheet "
            "there"
        )
    measured = (devices[0].memory_stats() or {}).get("bytes_limit", 0.0)
    return Topology(f"{chip.name}:{len(devices)}", chip, devices, (), measured=measured)


def _cpu(devices: int) -> Chip:
    """A CPU device: its share of this machine's memory and measured peak; bandwidths unknown."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / devices
    peak = matmul_peak("float32", jax.devices("cpu")[0]) / devices
    unknown = math.inf
    bandwidths = (unknown,) * 4
    return Chip("cpu", "cpu", ("cpu",), peak, memory, *bandwidths, torus=0, joined=0)

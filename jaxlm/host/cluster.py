"""Whether this process is one of several that train together; if so, starts `jax.distributed`.

    place = cluster.place()                    # None: a process of its own, nothing else happens
    if place:
        cluster.join(place, facts, console.note)
    cluster.share(value)                       # [value] where there is one process

Found in this order: JAX_COORDINATOR_ADDRESS=HOST:PORT with JAX_NUM_PROCESSES and JAX_PROCESS_ID (or
JOB_COMPLETION_INDEX, which Kubernetes gives the pods of an indexed job); a SLURM step (`srun`);
`mpirun` of Open MPI; a Kubernetes job or JobSet, where the package kubernetes is installed; Cloud
TPU VMs. JAX's own detection finds what the environment does not say. JAXLM_PROCESSES=1 switches it
all off. PORT is JAX's coordinator; our own connections (`fellows`) use the one after it.

Nothing here imports JAX before `join`.
"""

import ctypes
import functools
import hashlib
import importlib.util
import json
import os
import signal
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.host import rollcall
from jaxlm.host.fellows import Fellows
from jaxlm.host.hardware import nvidia_gpu, tpu_is_here
from jaxlm.host.stopping import Stopping

JOIN_SECONDS = 300  # for all to come; JAXLM_JOIN_SECONDS changes it
FIRST_PORT, PORT_PAIRS = 61440, 2048  # of SLURM's and Open MPI's jobs, up to 65535
HEARTBEAT_SECONDS = 100  # after which JAX ends everybody because one process is frozen

# Scheduler -> its variables: processes, this one's index, processes on this host, index among them.
SCHEDULERS = {
    "SLURM": ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_STEP_TASKS_PER_NODE", "SLURM_LOCALID"),
    "Open MPI": (
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
    ),
}

_fellows: Fellows | None = None
_stopping: Stopping | None = None


class Place(NamedTuple):
    """Where this process stands among those that train together."""

    host: str  # of process 0
    port: int  # of JAX's coordinator
    processes: int
    process: int
    devices: list[int] | None  # local ones to use; [] = all that are visible, None = JAX decides
    found: str  # how it is known, for people


def place() -> Place | None:
    """What the environment says, or None for a process of its own. Raises `ValueError` if it says
    only half."""
    if os.environ.get("JAXLM_PROCESSES") == "1":
        return None
    found = _explicit() or _scheduled() or _asked_of_jax()
    return found if found and found.processes > 1 else None


def _explicit():
    given = {n: os.environ.get(n, "") for n in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES")}
    index = os.environ.get("JAX_PROCESS_ID", "")
    if not index and any(given.values()):
        index = os.environ.get("JOB_COMPLETION_INDEX", "")
    given["JAX_PROCESS_ID"] = index
    if not any(given.values()) or given["JAX_NUM_PROCESSES"] == "1":
        return None
    if not all(given.values()):
        if _scheduler():
            return None  # which knows the rest
        raise ValueError(_half(given))
    address, processes, process = given.values()
    numbers = _number("JAX_NUM_PROCESSES", processes), _number("JAX_PROCESS_ID", process)
    return _checked(address, *numbers, _all_seen(), "JAX_COORDINATOR_ADDRESS")


def _half(given):
    missing = ", ".join(name for name, value in given.items() if not value)
    said = ", ".join(f"{name}={value}" for name, value in given.items() if value)
    return (
        f"{said} says that several processes train together, but {missing} is not set; each "
        "process needs all three (the index counts from 0), or none of them"
    )


def _scheduler():
    """The name of the scheduler that started this process as one of several, or ""."""
    for name, (count, *rest) in SCHEDULERS.items():
        here = all(v in os.environ for v in (count, rest[0], rest[2]))
        # A shell inside an allocation of SLURM is no step: nobody has started the other tasks.
        if here and (name != "SLURM" or "SLURM_STEP_NODELIST" in os.environ):
            return name if os.environ[count] != "1" else ""
    return ""


def _scheduled():
    if not (name := _scheduler()):
        return None
    variables = SCHEDULERS[name]
    processes, process, local = (_number(variables[i], os.environ[variables[i]]) for i in (0, 1, 3))
    here = _tasks_here(os.environ.get(variables[2], ""))
    address = os.environ.get("JAX_COORDINATOR_ADDRESS") or _of_this_job(_detected(name)[0])
    return _checked(address, processes, process, _own_gpus(local, here), name)


def _of_this_job(address):
    """The address with a port whose next one is no other job's: JAX's are 61440 + the job's number
    modulo 4096, so that jobs one after the other would have one port in common."""
    host, _, port = address.rpartition(":")
    if os.environ.get("JAX_COORDINATOR_PORT"):  # chosen by a person
        return address
    return f"{host}:{FIRST_PORT + 2 * (int(port) % PORT_PAIRS)}"


@functools.cache  # the metadata server may take its time
def _asked_of_jax():
    """TPU hosts and Kubernetes: only the metadata server or the cluster's own interface knows."""
    tpu = tpu_is_here() and os.environ.get("JAX_PLATFORMS", "tpu").startswith("tpu")
    pods = "KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" in os.environ
    name = "Cloud TPU" if tpu else "Kubernetes"
    package = "libtpu" if tpu else "kubernetes"
    if not (tpu or pods) or importlib.util.find_spec(package) is None:
        return None
    try:
        address, processes, process, _ = _detected(name)
    except ValueError:
        # A TPU without a metadata server to ask is alone, unless its environment knows of others.
        more = "," in os.environ.get("TPU_WORKER_HOSTNAMES", "") or _slices() > 1
        if pods or more or importlib.util.find_spec("requests") is None:  # which the asking takes
            raise
        return None
    if address is None or processes is None or processes == 1:
        return None
    return _checked(address, processes, process, None, name)


def _slices():
    return int(os.environ.get("MEGASCALE_NUM_SLICES", "1") or 1)


def _detected(name):
    """JAX's own detection: (coordinator, processes, process, local devices), None where unknown."""
    from jax._src import clusters  # the very call of jax.distributed.initialize(); not public

    try:
        found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, int(join_seconds())
        )
    except Exception as error:
        raise ValueError(
            f"this process runs under {name}, and the others could not be found: {error}; set "
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or JAXLM_PROCESSES=1 "
            "to train in this process alone"
        ) from None
    if found[0] is None and name in SCHEDULERS:
        raise ValueError(
            f"{name} does not say where process 0 is; set JAX_COORDINATOR_ADDRESS=HOST:PORT"
        )
    return found


def _checked(address, processes, process, devices, found):
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65535:
        raise ValueError(f"the coordinator's address is HOST:PORT, with a port, not {address!r}")
    if not 0 <= process < processes:
        raise ValueError(f"process {process} of {processes}: the index counts from 0")
    return Place(host.strip("[]"), int(port), processes, process, devices, found)


def _number(name, text):
    if not text.isdecimal():
        raise ValueError(f"{name}={text!r} must be a number")
    return int(text)


def _tasks_here(text):
    """Processes on this host; SLURM lists hosts in order, as 4(x2),1: the largest will do."""
    counts = [int(part.split("(")[0]) for part in text.split(",") if part[:1].isdecimal()]
    return max(counts, default=1)


def _all_seen():
    """All visible devices, or None: JAX_LOCAL_DEVICE_IDS names this process's, and JAX reads it."""
    return None if os.environ.get("JAX_LOCAL_DEVICE_IDS") else []


def _own_gpus(local, here):
    """This process's part of the GPUs of its host; all that it sees where it is alone there, or
    where the scheduler has given each process its own."""
    if _all_seen() is None:
        return None
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        seen = len([d for d in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if d])
        on_node = os.environ.get("SLURM_GPUS_ON_NODE", "")
        if on_node.isdecimal() and seen < int(on_node):
            return []  # SLURM has given each task its own
    else:
        seen = len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    share = seen // here
    return list(range(local * share, (local + 1) * share)) if here > 1 and share else []


def join_seconds() -> float:
    text = os.environ.get("JAXLM_JOIN_SECONDS", str(JOIN_SECONDS))
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"JAXLM_JOIN_SECONDS={text!r} must be a number of seconds") from None


# Joining.


def join(where: Place, facts: Mapping[str, Any], note: Callable[[str], None]) -> list[tuple]:
    """Meets the others, starts `jax.distributed`, and compares what must be the same everywhere.

    Returns (process, host, devices, kind) of each, for a table. Raises `ValueError`, the same on
    all, if somebody does not come, or names the first fact that differs, the host and both values.
    """
    global _fellows, _stopping
    here = Fellows(where.process, where.processes, where.host, where.port + 1)
    known = {**facts, "accelerator": nvidia_gpu() or ("TPU" if tpu_is_here() else "none")}
    stopping = Stopping(here)  # before anybody talks
    if where.process == 0:
        # JAX's service would share the port with another's, and take in the processes of both.
        rollcall.door_at(where.port).close()
    found = here.meet(known, join_seconds(), note)
    _fellows, _stopping = here, stopping
    _refuse(here, found)
    note("starting jax.distributed")
    _start(where)
    import jax

    note("looking for the devices of all")
    devices = jax.local_devices()
    about = {"devices here": len(devices), "kind of device": devices[0].device_kind}
    found = here.gather(about)
    _refuse(here, found)
    every = found or [about] * where.processes
    return [
        (i, here.hosts.get(i, "?"), one["devices here"], one["kind of device"])
        for i, one in enumerate(every)
    ]


def _start(where):
    import jax

    jax.config.update("jax_enable_preemption_service", False)  # `stopping` says why
    jax.distributed.initialize(
        f"{where.host}:{where.port}",
        where.processes,
        where.process,
        local_device_ids=where.devices,
        initialization_timeout=int(join_seconds()),
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
    )
    # When process 0 is killed, JAX aborts the others at once. The aborting thread sleeps first
    # (for 6 seconds: the number of the signal is what sleep() is given), so that the thread of
    # `fellows` can end the process with a sentence and a code that means "start again".
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc.signal(int(signal.SIGABRT), ctypes.cast(libc.sleep, ctypes.c_void_p))


def _difference(found, hosts):
    """The sentence about facts that are not the same on all; "" if there are none."""
    if found is None:
        return None  # only process 0 knows
    lines = []
    for i, facts in enumerate(found):
        for name in {**found[0], **facts}:
            there, here = found[0].get(name, "absent"), facts.get(name, "absent")
            if there != here:
                lines.append(
                    f"{name} is {there} on process 0 ({hosts[0]}), {here} on {i} ({hosts[i]})"
                )
    if not lines:
        return ""
    more = [f"and {len(lines) - 6} more"] if len(lines) > 6 else []
    return "the processes do not agree: " + "; ".join(lines[:6] + more)


def _refuse(here, found):
    """Raises `ValueError`, the same on all, where facts differ; `found` as `gather` gives them."""
    if words := here.broadcast(_difference(found, here.hosts)):
        raise ValueError(words)


# What the processes tell each other; all do nothing where there is one.


def several() -> bool:
    return _fellows is not None


def process() -> int:
    """The index of this process, without asking JAX."""
    return _fellows.index if _fellows else 0


def count() -> int:
    """How many processes there are."""
    return _fellows.count if _fellows else 1


def share(value: Any = None) -> list[Any]:
    """The values of all processes, on all: a barrier too. Main thread, in one order on all."""
    return _fellows.share(value) if _fellows else [value]


def broadcast(value: Any = None) -> Any:
    """The value of process 0, on all."""
    return _fellows.broadcast(value) if _fellows else value


def agree(what: str, value: Any) -> None:
    """Raises `ValueError`, the same on all, where it is not the same in all processes: what each
    has read for itself, before they compute with it together. Lists, texts, numbers, arrays."""
    if _fellows:
        text = json.dumps(value, default=lambda array: array.tolist())
        short = hashlib.sha256(text.encode()).hexdigest()[:12]
        _refuse(_fellows, _fellows.gather({what: short}))


def first(words: Iterable[str]) -> str:
    """The first that is not empty."""
    return next((w for w in words if w), "")


def stop_at(point: int, asked: str) -> str:
    """The signal that stops all processes at this point, or "". `asked`: the one this has got."""
    return _stopping.passed(point, asked) if _stopping else asked


def on_end(tell: Callable[[str, int], None]) -> None:
    """Calls `tell(sentence, code)` too before another process's end ends this one."""
    if _fellows:
        _fellows.on_end.append(tell)


def leave(words: str, code: int) -> bool:
    """Tells the others how this process ends; returns whether to say the words."""
    return _fellows.leave(words, code) if _fellows else True


def fail(words: str, code: int) -> None:
    """Ends this process and all others, from any thread."""
    if _fellows:
        _fellows.fail(words, code)


def prefix() -> str:
    return _fellows.prefix() if _fellows else ""


def suspect() -> None:
    """Call when something failed that a dead process may explain: the explanation then comes first,
    and ends this process."""
    if _fellows:
        _fellows.wait_for_a_verdict()

"""What several processes see to before they train: who is there, what they share, the same data.

With one process each of these is the plain thing: nothing is asked, said or waited for.
"""

import contextlib
import socket
import uuid
from pathlib import Path

import jax

from jaxlm import folder
from jaxlm.data.documents import Progress
from jaxlm.data.prepare import Prepared, prepare
from jaxlm.host import cluster
from jaxlm.host.console import Console
from jaxlm.specs import Run

SHOWN = 16  # processes in the table, at most


def join(where: cluster.Place, run: Run, console: Console) -> None:
    """Waits for all processes, and prints them. Raises `ValueError` if they do not agree."""
    title = f"{where.processes} of them ({where.found}), coordinator {where.host}:{where.port}"
    with console.phase(0, 6, "processes", title):
        versions = folder.versions()
        facts = {
            "the commit of jaxlm": folder.commit() or versions["jaxlm"],
            "the version of jax": jax.__version__,
            "the version of jaxlib": versions.get("jaxlib", ""),
        }
        facts |= {f"--config.{key}": str(value) for key, value in run.config.items()}
        found = cluster.join(where, facts, console.note)
        cluster.on_end(lambda words, code: console.error_in_log(words))
        console.table(found[:SHOWN], ("process", "host", "devices", "kind"))
        if len(found) > SHOWN:
            console.say(f"  and {len(found) - SHOWN} more, with as many devices each")
        console.say(f"  {jax.device_count()} devices in all; all of one commit and one config")


def sees(place: Path) -> list[bool]:
    """For each process whether this folder is the one of process 0, not another of that name."""
    token = place / f".seen-{uuid.uuid4().hex}"
    if cluster.process() == 0:
        with contextlib.suppress(OSError):
            place.mkdir(parents=True, exist_ok=True)
            token.touch()
    token = place / cluster.broadcast(token.name)
    seen = cluster.share(token.exists())
    if cluster.process() == 0:
        token.unlink(missing_ok=True)
    return seen


def writers(cache: Path) -> list[bool]:
    """For each process whether it writes to its cache: one for each cache that there is."""
    if not cluster.several():
        return [True]
    hosts, seen = cluster.share(socket.gethostname()), sees(cache)
    first = [hosts.index(host) == i for i, host in enumerate(hosts)]
    return [i == 0 or (alone and not seen[i]) for i, alone in enumerate(first)]


def require_one_workdir(run: Run) -> None:
    """Raises `ValueError` if the processes do not all see the same work folder."""
    if not cluster.several():
        return
    blind = [i for i, seen in enumerate(sees(run.workdir)) if not seen]
    hosts = cluster.share(socket.gethostname())
    if blind:
        raise ValueError(
            f"the work folder {run.workdir} is not the same on all hosts: process {blind[0]} on "
            f"{hosts[blind[0]]} does not see what process 0 wrote there; choose a "
            "--config.workdir on a file system that all of them share"
        )


def prepare_data(run: Run, cache: Path, progress: Progress) -> Prepared:
    """One process prepares the data, or one on each host that does not share process 0's cache.

    Raises `ValueError` if they end up with different records.
    """
    if not cluster.several():
        return prepare(run.data, cache, progress=progress)
    hosts, builds = cluster.share(socket.gethostname()), writers(cache)[cluster.process()]
    prepared = prepare(run.data, cache, progress=progress) if builds else None
    progress(0, 0, "waiting for the processes that prepare the data")
    cluster.share()
    prepared = prepared or prepare(run.data, cache, progress=progress)
    hashes = cluster.share(prepared.hash)
    for i, found in enumerate(hashes):
        if found != hashes[0]:
            raise ValueError(
                f"process {i} on {hosts[i]} has prepared other data than process 0 on {hosts[0]} "
                f"(records {found[:12]}, there {hashes[0][:12]}): the files of the sources, or the "
                "versions of Python and its packages, differ between these hosts"
            )
    return prepared

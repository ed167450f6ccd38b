"""One folder with trees of arrays: written, committed with its digest, read back. All of Orbax.

Orbax (its v1 interface, still called experimental) writes one item per tree and commits them
together by a rename. Arrays go in under flat names, so the structure of a tree never reaches the
disk: it comes from the tree restored into, and nothing is pickled.
"""

import errno
import functools
import json
import logging
import os
import pathlib
import re
import shutil
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint.experimental.v1 as ocp

from jaxlm.checkpoint import digest as digests
from jaxlm.checkpoint import stacks
from jaxlm.checkpoint.digest import Damaged, Digest
from jaxlm.files import write_atomically
from jaxlm.host import cluster

# Orbax logs whole tracebacks, several times, of errors that are raised here in one sentence.
logging.getLogger("absl").addFilter(lambda record: "/orbax/checkpoint/" not in record.pathname)

Trees = Mapping[str, Any]
"""Item of a checkpoint -> its tree of arrays."""

PARTS = "parts.json"  # item -> folder of a part -> names of its arrays

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EROFS, errno.EACCES, errno.EPERM}


class SaveError(ValueError):
    """The disk does not take a checkpoint. Those before it are untouched."""


def record(
    step: int, items: Trees, about: Mapping[str, Any], metrics: Mapping[str, float]
) -> Digest:
    """The digest of what is about to be saved."""
    trees = {item: digests.layout(tree) for item, tree in items.items()}
    # Through JSON now: what cannot be written is an error here, and later changes do not count.
    kept = json.loads(json.dumps(dict(about)))
    return Digest(step, trees, kept, {name: float(value) for name, value in metrics.items()})


def start(folder: pathlib.Path, items: Trees) -> ocp.AsyncResponse:
    """Starts writing all trees, but for those without arrays, which Orbax refuses."""
    arrays = {item: found for item, tree in items.items() if (found := digests.named(tree))}
    context = ocp.Context()
    # Weights are noise: compressing them saves 8 % of the disk and doubles the work of a save.
    context.array.saving.use_compression = False
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with context:
            return ocp.save_checkpointables_async(str(folder), arrays)
    except (OSError, ValueError) as error:
        raise _explained(folder, error) from error


def finish(response: ocp.AsyncResponse, folder: pathlib.Path, record: Digest) -> None:
    """Waits for Orbax to commit, then writes the digest; leaves nothing behind if that fails.

    Raises `SaveError` if the disk is full or may not be written, else what went wrong.
    """
    try:
        response.result()
        digests.write(folder, record, process=jax.process_index(), processes=jax.process_count())
    except Exception as error:
        shutil.rmtree(folder, ignore_errors=True)
        remove_leftovers(folder.parent)
        raise _explained(folder, error) from error


def _number(error) -> int | None:
    """The system's number of an error of writing, which Orbax has in its text."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return int(code[1]) if code else getattr(error, "errno", None)


def _explained(folder, error):
    """A `SaveError` if it is the disk that a person has to see to, else the error as it is."""
    number = _number(error)
    if number not in _DISK_FULL | _FORBIDDEN:
        return error
    why = "the disk is full" if number in _DISK_FULL else os.strerror(number)
    others = [path for path in folder.parent.glob("*") if path.name.isdecimal() and path != folder]
    return SaveError(
        f"checkpoint {folder.name} could not be written to {folder.parent}: {why}. "
        + ("The checkpoints before it are untouched; " if others else "It was the first one; ")
        + ("free some space and run" if number in _DISK_FULL else "once that is solved, run")
        + " the same command to "
        + ("continue from the last one" if others else "start again")
    )


def read(folder: pathlib.Path) -> Digest:
    """The digest of a checkpoint. Raises `Damaged`, with the folder in the text."""
    try:
        return digests.read(folder)
    except Damaged as error:
        raise Damaged(f"{folder} cannot be used: {error}") from None


def load(folder: pathlib.Path, abstract: Trees, verify: str, part: bool = False) -> dict[str, Any]:
    """Compares with the run first, then the files with their hashes, then reads.

    Layers may have been stacked and be wanted apart, or the other way round, unless `part`.
    """
    saved = read(folder)
    _refuse_another_model(folder, saved, abstract, part)
    try:
        digests.verify(folder, verify, items=abstract.keys())
    except Damaged as error:
        raise Damaged(f"{folder} cannot be used: {error}") from None
    wanted = {
        item: {name: _placed(leaf) for name, leaf in found.items()}
        for item, tree in abstract.items()
        if (found := digests.named(tree))
    }
    as_saved = {k: v for k, v in wanted.items() if part or v.keys() == saved.trees[k].keys()}
    arrays = _arrays(folder, as_saved, part)
    for item in [item for item in wanted if item not in as_saved]:  # layers are stacked otherwise
        some = functools.partial(_some, folder, item)
        there = stacks.shapes_like(saved.trees[item], wanted[item])
        arrays[item] = stacks.rearranged(some, there, wanted[item])
    return {
        item: jax.tree.unflatten(
            jax.tree.structure(tree), [arrays[item][name] for name in digests.named(tree)]
        )
        for item, tree in abstract.items()
    }


def save_in_parts(
    folder: pathlib.Path, item: str, parts: Iterable[Mapping[str, Any]], about: Mapping[str, Any]
) -> None:
    """Writes one tree as it comes, in parts of some arrays by name: never all are in memory.

    The parts are checkpoints of Orbax's inside the folder; `load` reads it like any other. Raises
    `OSError` for a disk that is full or may not be written.
    """
    tree: digests.Layout = {}
    names: dict[str, list[str]] = {}
    for part in parts:
        where = f"part-{len(names)}"
        try:
            start(folder / where, {item: part}).result()
        except ValueError as error:
            if not (number := _number(error)):
                raise
            raise OSError(number, os.strerror(number), str(folder)) from None
        names[where] = list(part)
        tree |= digests.layout(part)
    write_atomically(folder / PARTS, json.dumps({item: names}, indent=1))
    digests.write(folder, Digest(0, {item: tree}, dict(about), {}))


def _arrays(folder, wanted, part):
    """The arrays of each item by name, as they were saved."""
    if (folder / PARTS).is_file():
        return _load_parts(folder, wanted)
    return _load(folder, wanted, part) if wanted else {}


def _some(folder, item, structs):
    return _arrays(folder, {item: structs}, True)[item]


def _load_parts(folder, wanted):
    arrays: dict[str, dict[str, Any]] = {item: {} for item in wanted}
    for item, parts in json.loads((folder / PARTS).read_text()).items():
        for where, names in parts.items():
            if here := {name: wanted[item][name] for name in names if name in wanted.get(item, {})}:
                arrays[item] |= _load(folder / where, {item: here}, len(here) < len(names))[item]
    return arrays


def _load(folder, wanted, part):
    context = ocp.Context()
    context.pytree.loading.partial_load = part
    with context:
        return _own(ocp.load_checkpointables(str(folder), wanted))


def _refuse_another_model(folder, saved, abstract, part):
    lines = []
    for item, tree in abstract.items():
        now = digests.layout(tree)
        if now and not saved.trees.get(item):
            held = ", ".join(name for name, arrays in saved.trees.items() if arrays)
            raise ValueError(f"{folder} holds no {item!r}, only {held}")
        was = saved.trees.get(item, {})
        found = digests.differences(was, now, part=part)
        if found and not part:
            apart = digests.differences(stacks.by_layer(was), stacks.by_layer(now))
            found = min(found, apart, key=len)
        lines += [f"{item}/{line}" for line in found]
    if lines:
        more = f"\n  and {len(lines) - 8} more" if len(lines) > 8 else ""
        raise ValueError(
            f"{folder} was saved from another model or optimizer than this run's; "
            f"{len(lines)} arrays differ:\n  "
            + "\n  ".join(lines[:8])
            + f"{more}\nUse another workdir, or the config that the checkpoint was saved with"
        )


def _placed(leaf):
    sharding = getattr(leaf, "sharding", None)
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _own(arrays):
    """The same arrays in buffers of XLA's own: not all that a restore hands out can be donated.

    Donating them here costs no memory: most pass through, those that cannot are copied.
    """
    shardings = jax.tree.map(lambda x: x.sharding, arrays)
    copy = jax.jit(
        lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=shardings, donate_argnums=0
    )
    return copy(arrays)


def remove_leftovers(directory: pathlib.Path) -> None:
    """Removes what saves and deletions that were killed have left behind."""
    if cluster.process() == 0:
        for pattern in ("*.orbax-checkpoint-tmp*", "*.deleting"):
            for path in directory.glob(pattern):
                shutil.rmtree(path, ignore_errors=True)

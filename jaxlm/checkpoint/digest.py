"""What a finished checkpoint must contain: names, shapes, a hash per file, and how to check them.

Orbax alone does not tell damage from difference: flipped bytes load without an error, and a shape
mismatch raises what a truncated file raises. So a digest is written into the folder after Orbax
has committed it, as the last file and by an atomic rename. A folder without one is half-written;
one that no longer matches is damaged; one whose names, shapes or dtypes are not those of the run
belongs to another model. Each process hashes its share of the files, `digest-<i>-of-<n>.json`.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

import jax

from jaxlm.files import write_atomically

SCHEMA = 1
PREFIX = "digest-"

Layout = dict[str, tuple[tuple[int, ...], str]]
"""Name of each array of a tree -> its shape and dtype."""


class Damaged(ValueError):
    """The folder is not, or no longer, what was saved; the text says why."""


@dataclasses.dataclass(frozen=True)
class Digest:
    """What was saved, as process 0 wrote it down."""

    step: int
    trees: dict[str, Layout]
    about: dict[str, Any]
    metrics: dict[str, float]


def named(tree: Any) -> dict[str, Any]:
    """Leaves of a tree by name, `blocks/0/mlp/up/kernel`. Raises `ValueError` if two names clash.

    Nodes without leaves (None, optax's `EmptyState` and `MaskedNode`) leave no trace: their place
    comes from the tree that is restored into. A tree that is one leaf is called `value`.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    found = {
        jax.tree_util.keystr(path, simple=True, separator="/") or "value": leaf
        for path, leaf in leaves
    }
    if len(found) != len(leaves):
        raise ValueError("two arrays of one tree have the same name: a key may not contain '/'")
    return found


def layout(tree: Any) -> Layout:
    """Shapes and dtypes of a tree of arrays or of `jax.ShapeDtypeStruct`s."""
    return {name: (tuple(x.shape), str(x.dtype)) for name, x in named(tree).items()}


def differences(was: Layout, now: Layout, *, part: bool = False) -> list[str]:
    """One line per array that is not the same in both; with `part`, `now` may leave some out."""

    def text(one):
        return f"[{', '.join(map(str, one[0]))}] {one[1]}"

    lines = [
        f"{name}: was {text(was[name])}, now {text(now[name])}"
        for name in was
        if name in now and was[name] != now[name]
    ]
    if not part:
        lines += [f"{name}: was {text(was[name])}, now absent" for name in was if name not in now]
    return lines + [f"{name}: was absent, now {text(now[name])}" for name in now if name not in was]


def write(folder: pathlib.Path, digest: Digest, *, process: int = 0, processes: int = 1) -> None:
    """Hashes this process's share of the files and writes its digest, atomically."""
    files = _hashed(folder, _data_files(folder)[process::processes])
    content = {"schema": SCHEMA, "process": process, "processes": processes, "files": files}
    _write(folder, content | dataclasses.asdict(digest))


def complete(folder: pathlib.Path) -> None:
    """Process 0 adds what it sees and nobody has hashed, once the digests of all are there: on a
    network file system the list of files that another shared out by may have been an old one."""
    contents = _contents(folder)
    known = {name for content in contents for name in content["files"]}
    if left := [name for name in _data_files(folder) if name not in known]:
        contents[0]["files"] |= _hashed(folder, left)
        _write(folder, contents[0])


def read(folder: pathlib.Path) -> Digest:
    """What the folder holds. Raises `Damaged`, or `ValueError` for a schema from the future."""
    return _digest(_contents(folder)[0])


def _digest(content) -> Digest:
    trees = {
        item: {name: (tuple(shape), dtype) for name, (shape, dtype) in tree.items()}
        for item, tree in content["trees"].items()
    }
    return Digest(content["step"], trees, content["about"], content["metrics"])


def verify(
    folder: pathlib.Path,
    how: str = "full",
    *,
    items: Collection[str] = (),
    process: int = 0,
    processes: int = 1,
) -> Digest:
    """`read`, after comparing every data file: its hash (`full`) or only its size (`sizes`).

    `items`: the trees that are to be read, if not all: the files of the others are not looked at.
    Of several processes each compares its share of the files.
    """
    contents = _contents(folder)
    others = contents[0]["trees"].keys() - items if items else ()
    files = sorted((k, v) for content in contents for k, v in content["files"].items())
    files = [(name, file) for name, file in files if name.split("/")[0] not in others]
    for name, (size, hashed) in files[process::processes]:
        path = folder / name
        if not path.is_file():
            raise Damaged(f"{name} is missing")
        if (now := path.stat().st_size) != size:
            raise Damaged(f"{name} has {now:,} bytes instead of {size:,}")
        if how == "full" and _hash(path) != hashed:
            raise Damaged(f"the bytes of {name} have changed since it was written")
    return _digest(contents[0])


def add_metrics(folder: pathlib.Path, metrics: Mapping[str, float]) -> None:
    """Writes down what was measured of a checkpoint after it was saved."""
    content = _contents(folder)[0]
    content["metrics"] |= {name: float(value) for name, value in metrics.items()}
    _write(folder, content)


def _contents(folder):
    """The digests of all processes, process 0 first; checks their seals and their number."""
    if not folder.is_dir() or not any(folder.iterdir()):
        raise Damaged("the folder is empty" if folder.is_dir() else "the folder is missing")
    found = {}
    for path in folder.glob(f"{PREFIX}*.json"):
        try:
            content = dict(json.loads(path.read_text(encoding="utf-8")))
            seal = content.pop("seal")
        except (ValueError, KeyError, TypeError):
            raise Damaged(f"{path.name} is not readable") from None
        if content.get("schema", 0) > SCHEMA:
            raise ValueError(
                f"{folder} was written by a newer jaxlm (checkpoint schema {content['schema']}, "
                f"this one reads up to {SCHEMA}); upgrade jaxlm to read it"
            )
        if seal != _seal(content):
            raise Damaged(f"{path.name} has changed since it was written")
        found[content["process"]] = content
    if not found:
        raise Damaged("it has no digest, so it was not written to its end")
    processes = next(iter(found.values()))["processes"]
    if missing := sorted(set(range(processes)) - set(found)):
        raise Damaged(f"the digest of process {missing[0]} of {processes} is missing")
    return [found[i] for i in range(processes)]


def _data_files(folder):
    return sorted(
        str(path.relative_to(folder).as_posix())
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(PREFIX)
    )


def _hashed(folder, names):
    return {name: [(folder / name).stat().st_size, _hash(folder / name)] for name in names}


def _write(folder, content):
    text = json.dumps(content | {"seal": _seal(content)}, indent=1)
    name = f"{PREFIX}{content['process']}-of-{content['processes']}.json"
    write_atomically(folder / name, text)


def _hash(path):
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _seal(content):
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

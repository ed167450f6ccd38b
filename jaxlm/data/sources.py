"""Where text comes from: one frozen spec a source, told apart by the path alone.

stdlib-code, stdlib-prose     the built-in corpora, no network (`corpora`)
exercises                     built-in questions with answers right and wrong (`exercises`)
tfds:NAME                     a TFDS data set prepared on this machine, "name/config:version"
a folder                      TFDS when it holds dataset_info.json, else all files that match
                              `glob` ("**/*" without one), each read by its suffix
a file, or a path with * ?    .jsonl .jsonl.gz .ndjson / .parquet / .array_record; .json that is
                              an array of objects (with the key `text`); any other is one UTF-8 text
"""

import dataclasses
import glob as globbing
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterator

from jaxlm.data import corpora, examples, exercises, filters, readers
from jaxlm.data.documents import Document, Progress, Tally

TEXTS = ("stdlib-code", "stdlib-prose")
BUILT_IN = (*TEXTS, "exercises")


@dataclasses.dataclass(frozen=True)
class SourceSpec:
    """One source of a mixture. `weight` is relative to the other sources."""

    name: str
    source: str  # see the module docstring
    weight: float = 1.0
    max_tokens: int = 0  # training tokens to use, the first ones; 0 = all
    max_epochs: float = 0.0  # times each row may be trained on; 0 = no limit
    filter: str = ""  # "min_characters=200, match='^import'", see `filters`
    text: str = "text"  # the key or column that holds the text
    glob: str = ""  # files of a folder: "**/*.py"
    split: str = "train"  # of a TFDS data set
    format: str = ""  # "text", "chat", "pairs", "feedback" (`examples`); "" = what the method reads
    lift: str = ""  # pairs with a limit on the length (`lift`): "both" adds them, "only" keeps them

    def __post_init__(self):
        if not self.name or set(self.name) & set(" :;/=,"):
            raise ValueError(f"a source needs a name without spaces or : ; / = , not {self.name!r}")
        if not self.source:
            raise ValueError(
                f"source {self.name!r} has no path; give a file, a folder or {BUILT_IN}"
            )
        if not 0 <= self.weight < float("inf"):
            raise ValueError(f"source {self.name!r}: weight {self.weight} must be 0 or more")
        if self.max_tokens < 0 or self.max_epochs < 0:
            raise ValueError(f"source {self.name!r}: max_tokens and max_epochs must be 0 or more")
        filters.parse_filter(self.filter)
        if self.format not in ("", *examples.FORMATS):
            raise ValueError(
                f"source {self.name!r}: format={self.format!r} may be '' or one of "
                f"{', '.join(examples.FORMATS)}"
            )
        if self.lift not in examples.LIFT or (self.lift and self.format not in ("", "pairs")):
            raise ValueError(
                f"source {self.name!r}: lift={self.lift!r} may be '', 'both' or 'only', and needs "
                "format='pairs'"
            )

    @property
    def structured(self) -> bool:
        """Whether its rows are conversations, preferences or feedback."""
        return self.format not in ("", "text")


def parse_added(text: str) -> tuple[SourceSpec, ...]:
    """ "name:path:weight; name:path:weight" as specs; the path may contain colons."""
    specs = []
    for item in filter(None, map(str.strip, re.split("[;,]", text))):
        name, _, rest = item.partition(":")
        path, _, weight = rest.rpartition(":")
        try:
            specs.append(SourceSpec(name.strip(), path.strip(), _weight(weight)))
        except ValueError as error:
            raise ValueError(
                f"{item!r} is no source to add: write name:path:weight, such as "
                f"notes:/data/notes.jsonl:0.5, with a comma between several ({error})"
            ) from None
    return tuple(specs)


def _weight(text):
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{text!r} is no weight") from None


def files(spec: SourceSpec) -> list[pathlib.Path]:
    """The files of a source that is neither built in nor TFDS, sorted."""
    path = pathlib.Path(spec.source).expanduser()
    if path.is_dir():
        pattern = spec.glob or "**/*"
        found = [p for p in path.glob(pattern) if p.is_file() and not _hidden(p.relative_to(path))]
        where = f"no file in {path} matches {pattern!r}; set glob, such as '**/*.txt'"
    elif path.is_file():
        return [path]
    else:
        found = [pathlib.Path(p) for p in globbing.glob(str(path), recursive=True)]
        found = [p for p in found if p.is_file()]
        where = (
            f"{path} does not exist (seen from {pathlib.Path.cwd()}); check the path, or name a "
            f"built-in corpus ({', '.join(BUILT_IN)}) or a TFDS data set (tfds:NAME)"
        )
    if not found:
        raise ValueError(f"source {spec.name!r}: {where}.")
    return sorted(found)


def _hidden(path: pathlib.Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in path.parts)


def is_tfds(spec: SourceSpec) -> bool:
    """Whether the source is read through `tfds.data_source`."""
    return spec.source.startswith("tfds:") or readers.is_tfds_folder(spec.source)


def fingerprint(spec: SourceSpec) -> str:
    """Changes when the source may have changed; from names, sizes and times, so it is quick."""
    if spec.source in TEXTS:
        facts = corpora.fingerprint()
    elif spec.source in BUILT_IN:
        facts = exercises.fingerprint()
    elif is_tfds(spec):
        facts = readers.tfds_files(spec.source, spec.name)
    else:
        facts = files(spec)
    digest = hashlib.sha256()
    for fact in facts:
        if isinstance(fact, pathlib.Path):
            stat = _stat(fact, spec)
            fact = (os.fspath(fact.absolute()), stat.st_size, stat.st_mtime_ns)
        digest.update(repr(fact).encode())
    return digest.hexdigest()


def size(spec: SourceSpec, held_out: float, progress: Progress | None = None) -> int:
    """Roughly how many characters `read` will yield; 0 = unknown."""
    if spec.source in TEXTS:
        return sum(len(d.text) for d in corpora.load(held_out, progress)[spec.source])
    if spec.source in BUILT_IN or is_tfds(spec):
        return 0
    paths = files(spec)
    packed = any(readers.kind(p) in ("parquet", "array_record") or p.suffix == ".gz" for p in paths)
    return 0 if packed else sum(_stat(p, spec).st_size for p in paths)


def _stat(path: pathlib.Path, spec: SourceSpec) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise _gone(path, spec, error) from None


def _gone(path, spec, error):
    return ValueError(
        f"source {spec.name!r}: {path} was listed and then could not be read "
        f"({error.strerror or error}); see that nothing moves or rewrites the files and that you "
        "may read them, and start again"
    )


def read(
    spec: SourceSpec, tally: Tally, held_out: float, progress: Progress | None = None
) -> Iterator[Document]:
    """The documents of a source, filtered. The caller checks `tally` at the end."""
    keep, key = filters.parse_filter(spec.filter), "" if spec.structured else spec.text
    _require_rows(spec)
    if spec.source in TEXTS:
        found = corpora.rows(spec.source, held_out, tally, progress)
    elif spec.source in BUILT_IN:
        found = exercises.rows(spec.format, tally)
    elif is_tfds(spec):
        found = readers.tfds_rows(spec.source, spec.name, spec.split, key, tally)
    else:
        found = _from_files(spec, key, tally)
    if spec.structured:
        found = examples.read(found, spec.format, spec.lift, held_out, tally)
    for document in found:
        if not document.text.strip():
            tally.empty += 1
        elif spec.filter and not keep(_said(document) if spec.structured else document):
            tally.filtered += 1
        else:
            yield document


def _said(document: Document) -> Document:
    """What is said in the example that the document holds, message by message."""
    return document._replace(text="\n".join(examples.texts(json.loads(document.text))))


def read_as_one_text(spec: SourceSpec) -> str:
    """A sentence if somebody may expect the rows of a table where a text is read; else ""."""
    table = pathlib.Path(spec.source).suffix in (".json", ".csv", ".tsv")
    if spec.source in BUILT_IN or spec.structured or not table:
        return ""
    path = pathlib.Path(spec.source).expanduser()
    if readers.kind(path) == "json" and path.is_file() and readers.is_array(path, spec.text):
        return ""
    return (
        f"Source {spec.name!r}: {spec.source} was read as plain text; write it as JSON lines or "
        "Parquet to have one document a row."
    )


def remedy(spec: SourceSpec) -> str:
    """What to do about rows that cannot be read."""
    folder = spec.source not in BUILT_IN and not is_tfds(spec)
    if folder and pathlib.Path(spec.source).expanduser().is_dir():
        return "Leave such files out with glob, as in glob='**/*.txt', or repair them"
    if spec.structured:
        return f"Repair them, or name another format than {spec.format!r} for this source"
    return f"Repair them, or name another key than text={spec.text!r}"


def _require_rows(spec: SourceSpec) -> None:
    if spec.structured == (spec.source in TEXTS) and spec.source in BUILT_IN:
        gives = "text" if spec.source in TEXTS else "conversations"
        raise ValueError(
            f"source {spec.name!r}: {spec.source} gives {gives}, and format={spec.format!r} is "
            f"asked of it; {_otherwise(spec)}"
        )


def _otherwise(spec):
    if spec.structured:
        return "give a file with such rows, or train with next_token"
    return f"set config.data.mix.{spec.name}.format='chat', or use dpo or another such method"


def _from_files(spec: SourceSpec, key: str, tally: Tally) -> Iterator[Document]:
    root = pathlib.Path(spec.source).expanduser()
    for path in files(spec):
        name = path.relative_to(root).as_posix() if root.is_dir() else path.name
        try:
            yield from readers.READERS[readers.kind(path)](path, name, key, tally)
        except OSError as error:
            raise _gone(path, spec, error) from None

"""Sources -> a tokenizer and packed records, each built once and then found in the cache.

The cache key covers the files (names, sizes, times), the knobs that matter and this package's own
code; `Prepared.hash` covers what came out, so a rebuilt cache with the same content is the same.
Processes that start together wait for the one that builds.
"""

import dataclasses
import functools
import hashlib
import os
import pathlib

from jaxlm.data import build, chat, sources, tokenizer
from jaxlm.data.cache import Found, cached
from jaxlm.data.documents import Document, Progress
from jaxlm.data.meter import throttled
from jaxlm.data.spec import DataSpec

# Everything that decides what is built from given files.
_CODE = """build chat conversations corpora documents examples exercises filters lift pack readers
records repeats sources tokenizer"""


@dataclasses.dataclass(frozen=True)
class PreparedSource:
    """One packed source."""

    name: str
    weight: float
    max_epochs: float
    records: tuple[pathlib.Path, ...]
    rows: int
    tokens: int  # targets in one epoch
    characters: int  # that these tokens stand for
    held_out: list[Document]
    length: int
    dtype: str  # of the stored tokens
    format: str = "text"  # of its records: "text", or see `conversations`
    held_out_records: tuple[pathlib.Path, ...] = ()  # of conversations, like `records`
    held_out_rows: int = 0


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What a run reads. `card` and `notes` are for people, `hash` is for resuming."""

    tokenizer: tokenizer.Tokenizer
    tokenizer_folder: pathlib.Path
    sources: tuple[PreparedSource, ...]
    hash: str
    card: dict
    notes: tuple[str, ...]  # sentences: malformed rows, damaged caches, nothing held out
    cached: bool  # nothing had to be built
    template: str = ""  # the chat template, where a source holds conversations


def prepare(
    spec: DataSpec,
    cache: os.PathLike | str,
    progress: Progress | None = None,
) -> Prepared:
    """Builds or finds the tokenizer and every source's records.

    Raises `ValueError` for a source that cannot be read: before anything is built, where its first
    rows show it.
    """
    root, report = pathlib.Path(cache).expanduser(), throttled(progress)
    prints = {source.name: sources.fingerprint(source) for source in spec.sources}
    folder = _tokenizer_folder(spec, prints, root, report)
    tokens = tokenizer.load(folder.folder, spec.tokenizer)
    template, note = None, ""
    if spec.structured:
        template, note = chat.find(spec.template, tokens, folder.folder)
    folders = [
        _source_folder(spec, s, prints[s.name], tokens, template, root) for s in spec.sources
    ]
    for source, records in zip(spec.sources, folders, strict=True):
        if not records.is_dir():
            build.probe(source, spec, report)
    found = [
        _source(spec, source, records, tokens, template, report)
        for source, records in zip(spec.sources, folders, strict=True)
    ]
    _require_both_labels(found)
    card = _card(spec, tokens, found)
    every = (folder, *found)
    return Prepared(
        tokens,
        folder.folder,
        tuple(map(functools.partial(_described, spec.length), spec.sources, found)),
        card["hash"],
        card,
        (
            *([note] if note else []),
            *(n for part in every for n in (part.note, *part.facts.get("notes", ())) if n),
        ),
        all(part.cached for part in every),
        template.text if template else "",
    )


def _tokenizer_folder(spec: DataSpec, prints, root: pathlib.Path, report: Progress) -> Found:
    if spec.tokenizer not in ("bpe", "byte"):
        return Found(pathlib.Path(spec.tokenizer).expanduser(), {}, True, "")
    asked = [(_content(source), prints[source.name]) for source in spec.sources]
    about = (spec.vocabulary, spec.held_out, asked) if spec.tokenizer == "bpe" else ()
    folder = root / "tokenizers" / _key(spec.tokenizer, about)
    make = functools.partial(build.build_tokenizer, spec=spec, report=report)
    return cached(folder, "tokenizer", make, report)


def _source_folder(spec, source, fingerprint, tokens, template, root) -> pathlib.Path:
    about = (_content(source), source.max_tokens, spec.held_out, spec.skip_malformed)
    if source.structured:
        about += (template.hash, spec.too_long)
    return root / "records" / _key(fingerprint, about, tokens.hash, spec.length)


def _source(spec, source, folder, tokens, template, report) -> Found:
    make = functools.partial(
        build.build_records,
        spec=spec,
        source=source,
        tokens=tokens,
        template=template,
        report=report,
    )
    return cached(folder, f"source {source.name!r}", make, report)


def _described(length: int, source: sources.SourceSpec, found: Found) -> PreparedSource:
    card = found.facts["card"]
    return PreparedSource(
        name=source.name,
        weight=source.weight,
        max_epochs=source.max_epochs,
        records=tuple(found.folder / name for name in found.facts["files"]),
        rows=card["rows"],
        tokens=card["tokens"],
        characters=card["characters"],
        held_out=build.read_held_out(found.folder / "held_out.jsonl"),
        length=length,
        dtype=found.facts["dtype"],
        format=source.format or "text",
        held_out_records=tuple(found.folder / n for n in found.facts.get("held_out_files", ())),
        held_out_rows=card.get("held_out_rows", 0),
    )


def _require_both_labels(found: list[Found]) -> None:
    """Raises `ValueError` where all feedback says the same."""
    cards = [part.facts["card"] for part in found if "liked" in part.facts["card"]]
    liked, total = sum(c["liked"] for c in cards), sum(c["documents"] for c in cards)
    if cards and liked in (0, total):
        value = "false" if not liked else "true"
        raise ValueError(
            f"all {total:,} labels of the feedback are {value}: there is nothing to tell apart. "
            "Add examples of the other kind, or train on the good ones with next_token"
        )


def _card(spec: DataSpec, tokens: tokenizer.Tokenizer, found: list[Found]) -> dict:
    digest = hashlib.sha256(f"{tokens.hash} {spec.length}".encode())
    for source, part in zip(spec.sources, found, strict=True):
        both = part.facts["records_hash"], part.facts["card"]["hash"]  # the second: held-out too
        digest.update(f" {source.name} {both}".encode())
    return {
        "sources": {
            source.name: part.facts["card"]
            for source, part in zip(spec.sources, found, strict=True)
        },
        "tokenizer": {
            "name": spec.tokenizer,
            "vocabulary": tokens.vocabulary_size,
            "lossless": all(part.facts["lossless"] for part in found),
            "hash": tokens.hash,
        },
        "length": spec.length,
        "hash": digest.hexdigest(),
    }


def _content(source: sources.SourceSpec) -> tuple:
    """What of a source decides its text, next to its files."""
    where = source.source, source.filter, source.text, source.glob, source.split
    return *where, source.format, source.lift


def _key(*parts: object) -> str:
    return hashlib.sha256(repr((_code_hash(), *parts)).encode()).hexdigest()[:20]


@functools.cache
def _code_hash() -> str:
    """Of this package's files: whoever changes how data is made need not remember a number."""
    digest = hashlib.sha256()
    for name in _CODE.split():
        digest.update(pathlib.Path(__file__).with_name(f"{name}.py").read_bytes())
    return digest.hexdigest()

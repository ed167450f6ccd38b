"""Sources -> a tokenizer and packed records, each built once and then found in the cache.

Text streams through in chunks of a few megabytes, so a source may be larger than memory. The
cache key covers the files (names, sizes, times), the knobs that matter and this package's own
code; `Prepared.hash` covers what came out, so a rebuilt cache with the same content is the same.
The tokenizer encodes on all cores in threads of its own (no process is forked, which would be
unsafe next to JAX); packing and writing go on meanwhile.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np

from jaxlm.data import cache as caching
from jaxlm.data import pack, records, sources, tokenizer
from jaxlm.data.documents import Document, Progress, Tally, distinct, is_held_out

CHUNK = 2**20  # characters tokenized at a time
TRAIN_TOKENIZER_ON = 2**25  # characters in all, an equal share from each source
HELD_OUT_LIMIT = 2**24  # characters of a source kept for evaluation; the rest is only left out


@dataclasses.dataclass(frozen=True)
class DataSpec:
    """All that decides the data of a run."""

    sources: tuple[sources.SourceSpec, ...]
    tokenizer: str = "bpe"  # "bpe", "byte", or a folder with a Hugging Face tokenizer
    vocabulary: int = 4096  # of a trained "bpe"
    length: int = 128  # tokens of a row
    held_out: float = 0.045  # share of the documents kept for evaluation
    skip_malformed: float = 0.01  # share of a source's rows that may be unreadable
    stages: str = ""  # weights over time, see `mix`; "" = the sources' weights throughout
    attend_across_documents: bool = False  # see `pack.to_batch`

    def __post_init__(self):
        names = [source.name for source in self.sources]
        if not names:
            raise ValueError(
                "the data has no source; add one with --config.data.add=name:path:weight"
            )
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"the sources {twice} are defined twice; give each its own name")
        if not 0 <= self.held_out < 1 or not 0 <= self.skip_malformed <= 1:
            raise ValueError(
                f"held_out={self.held_out} and skip_malformed={self.skip_malformed} are shares "
                f"from 0 to 1"
            )
        if self.length < 2:
            raise ValueError(
                f"length={self.length} leaves no row to train on; use 2 or more tokens"
            )
        if self.tokenizer == "bpe" and self.vocabulary < 258:
            raise ValueError(f"vocabulary={self.vocabulary} must be at least 256 bytes + bos + eos")


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


def prepare(
    spec: DataSpec,
    cache: os.PathLike | str,
    workers: int = 0,
    progress: Progress | None = None,
) -> Prepared:
    """Builds or finds the tokenizer and every source's records; `workers` 0 = all cores."""
    if workers:
        os.environ.setdefault("RAYON_NUM_THREADS", str(workers))  # read once, at the first encoding
    root, report = pathlib.Path(cache).expanduser(), throttled(progress)
    prints = {source.name: sources.fingerprint(source) for source in spec.sources}
    folder = _tokenizer_folder(spec, prints, root, report)
    tokens = tokenizer.load(folder.folder, spec.tokenizer)
    built = [
        _source_folder(spec, source, prints[source.name], tokens, root, report)
        for source in spec.sources
    ]
    prepared = tuple(map(functools.partial(_described, spec), spec.sources, built))
    digest = hashlib.sha256(f"{tokens.hash} {spec.length}".encode())
    for source, found in zip(spec.sources, built, strict=True):
        digest.update(f"{source.name} {found.facts['records_hash']}".encode())
    card = {
        "sources": {
            s.name: found.facts["card"] for s, found in zip(spec.sources, built, strict=True)
        },
        "tokenizer": {
            "name": spec.tokenizer,
            "vocabulary": tokens.vocabulary_size,
            "lossless": all(found.facts["lossless"] for found in built),
            "hash": tokens.hash,
        },
        "length": spec.length,
        "hash": digest.hexdigest(),
    }
    every = (folder, *built)
    notes = [
        note for found in every for note in (found.note, *found.facts.get("notes", ())) if note
    ]
    return Prepared(
        tokens,
        folder.folder,
        prepared,
        digest.hexdigest(),
        card,
        tuple(notes),
        all(found.cached for found in every),
    )


def _described(spec, source, found) -> PreparedSource:
    with open(found.folder / "held_out.jsonl", encoding="utf-8") as lines:
        held_out = [
            Document(row["name"], row["text"], "held_out") for row in map(json.loads, lines)
        ]
    facts = found.facts
    return PreparedSource(
        source.name,
        source.weight,
        source.max_epochs,
        tuple(found.folder / name for name in facts["files"]),
        facts["rows"],
        facts["tokens"],
        facts["characters"],
        held_out,
        spec.length,
        facts["dtype"],
    )


# ---------------------------------------------------------------- the tokenizer


def _tokenizer_folder(spec, prints, root, report) -> caching.Found:
    if spec.tokenizer not in ("bpe", "byte"):
        return caching.Found(pathlib.Path(spec.tokenizer).expanduser(), {}, True, "")
    asked = [(_content_key(source), prints[source.name]) for source in spec.sources]
    about = (spec.vocabulary, spec.held_out, asked) if spec.tokenizer == "bpe" else ()
    folder = root / "tokenizers" / _key(spec.tokenizer, about)

    def build(temporary: pathlib.Path) -> dict:
        if spec.tokenizer == "byte":
            tokenizer.save_byte(temporary)
            return {}
        texts = _training_texts(spec, report)
        waiting = f"training the tokenizer, {spec.vocabulary} tokens"
        _while_reporting(
            lambda: tokenizer.train_bpe(texts, spec.vocabulary, temporary), report, waiting
        )
        return {}

    return caching.cached(folder, "tokenizer", build, report)


def _training_texts(spec: DataSpec, report: Progress) -> Iterator[str]:
    limit = TRAIN_TOKENIZER_ON // len(spec.sources)
    for source in spec.sources:
        used = 0
        for held, document in _split(spec, source, Tally(), report):
            if not held:
                used += len(document.text)
                yield document.text
            if used >= limit:
                break


# ---------------------------------------------------------------- the records


def _source_folder(spec, source, fingerprint, tokens, root, report) -> caching.Found:
    about = (_content_key(source), source.max_tokens, spec.held_out, spec.skip_malformed)
    folder = root / "records" / _key(fingerprint, about, tokens.hash, spec.length)

    def build(temporary: pathlib.Path) -> dict:
        return build_records(temporary, spec, source, tokens, report)

    return caching.cached(folder, f"source {source.name!r}", build, report)


def build_records(
    folder: pathlib.Path,
    spec: DataSpec,
    source: sources.SourceSpec,
    tokens: tokenizer.Tokenizer,
    report: Progress,
) -> dict:
    """Writes the packed rows and held_out.jsonl of one source; returns the facts about them."""
    tally, text_hash = Tally(), hashlib.sha256()
    dtype = tokenizer.token_dtype(tokens.vocabulary_size)
    writer, left = records.Writer(folder, dtype), pack.EMPTY
    total = sources.size(source, spec.held_out)
    done = documents = characters = count = held_documents = held_characters = 0
    lossless = True
    with open(folder / "held_out.jsonl", "w", encoding="utf-8") as held_file:

        def training() -> Iterator[Document]:
            nonlocal held_documents, held_characters
            for held, document in _split(spec, source, tally, report):
                text_hash.update(document.text.encode())
                if not held:
                    yield document
                elif held_characters < HELD_OUT_LIMIT:
                    held_documents += 1
                    held_characters += len(document.text)
                    held_file.write(
                        json.dumps({"name": document.name, "text": document.text}) + "\n"
                    )

        for chunk, ids in _encoded(training(), tokens, report, source.name):
            if not documents:
                lossless = tokens.is_lossless(chunk[0].text[:10_000])
            ids, share = _capped(ids, source.max_tokens - count if source.max_tokens else None)
            rows, left = pack.pack(
                ids, spec.length, tokens.bos, tokens.eos, before=left, last=False
            )
            writer.write(rows)
            documents += len(ids)
            count += sum(map(len, ids)) + len(ids)
            lengths = [len(document.text) for document in chunk[: len(ids)]]
            done += sum(lengths)
            characters += sum(lengths) - round((1 - share) * lengths[-1])
            report(done, max(total, done) if total else 0, f"{source.name}: tokenizing and packing")
            if source.max_tokens and count >= source.max_tokens:
                break
    tally.check(source.name, spec.skip_malformed)
    writer.write(pack.pack([], spec.length, tokens.bos, tokens.eos, before=left)[0])
    writer.close()
    if not writer.rows:
        raise ValueError(
            f"source {source.name!r} has no document to train on: of {tally.rows} rows "
            f"{tally.malformed} are malformed, {tally.empty} empty, {tally.filtered} filtered out, "
            f"{tally.duplicates} duplicates and {held_documents} held out."
        )
    report(done, done, f"{source.name}: {count:,} tokens in {writer.rows:,} rows")
    card = {
        "documents": documents,
        "characters": characters,
        "tokens": count,
        "rows": writer.rows,
        "chars_per_token": characters / count,
        "duplicates": tally.duplicates,
        "malformed": tally.malformed,
        "empty": tally.empty,
        "filtered": tally.filtered,
        "held_out_documents": held_documents,
        "held_out_characters": held_characters,
        "hash": text_hash.hexdigest(),
    }
    return {
        "card": card,
        "files": writer.names,
        "rows": writer.rows,
        "tokens": count,
        "characters": characters,
        "dtype": dtype.str,
        "lossless": lossless,
        "records_hash": writer.hash,
        "notes": _notes(source, spec, tokens, tally, held_documents, lossless),
    }


def _notes(source, spec, tokens, tally, held_documents, lossless) -> list[str]:
    notes = []
    if tally.malformed:
        notes.append(
            f"Source {source.name!r}: {tally.malformed} malformed rows of {tally.rows} were "
            f"skipped, first {tally.where[0]}."
        )
    if spec.held_out and not held_documents:
        notes.append(
            f"Source {source.name!r}: none of its few documents fell to the held-out share "
            f"{spec.held_out:g}, so it will not be evaluated; raise data.held_out to hold some out."
        )
    if not lossless:
        notes.append(
            f"The tokenizer {tokens.name} does not give the text of {source.name!r} back exactly, "
            f"so its bits per character are not comparable with compressors."
        )
    return notes


def _split(spec, source, tally, report) -> Iterator[tuple[bool, Document]]:
    """(held out?, document) of each distinct document of a source."""
    found = distinct(sources.read(source, tally, spec.held_out, report), tally)
    for key, document in found:
        report(0, 0, f"{source.name}: reading")
        yield (
            document.split == "held_out"
            or (not document.split and is_held_out(key, spec.held_out)),
            document,
        )


def _encoded(documents, tokens, report, name) -> Iterator[tuple[list[Document], list[list[int]]]]:
    """(documents, their ids) chunk by chunk; the next chunk is encoded while one is used."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        before = None
        for chunk in _chunks(documents):
            encoding = pool.submit(tokens.encode_batch, [document.text for document in chunk])
            if before:
                yield before[0], _result(before[1], report, f"{name}: tokenizing")
            before = chunk, encoding
        if before:
            yield before[0], _result(before[1], report, f"{name}: tokenizing")


def _chunks(documents: Iterator[Document]) -> Iterator[list[Document]]:
    chunk, characters = [], 0
    for document in documents:
        chunk.append(document)
        characters += len(document.text)
        if characters >= CHUNK:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _capped(ids: list[list[int]], room: int | None) -> tuple[list[list[int]], float]:
    """The documents that fit in `room` tokens, eos included, and the share kept of the last."""
    if room is None:
        return ids, 1.0
    for i, document in enumerate(ids):
        if len(document) + 1 > room:
            kept = document[: max(0, room - 1)]
            return [*ids[:i], kept], len(kept) / max(1, len(document))
        room -= len(document) + 1
        if not room:
            return ids[: i + 1], 1.0
    return ids, 1.0


# ---------------------------------------------------------------- small helpers


def _content_key(source: sources.SourceSpec) -> tuple:
    return source.source, source.filter, source.text, source.glob, source.split


def _key(*parts: object) -> str:
    return hashlib.sha256(repr((_code_hash(), *parts)).encode()).hexdigest()[:20]


@functools.cache
def _code_hash() -> str:
    """Of this package's files: whoever changes how data is made need not remember a number."""
    digest = hashlib.sha256(np.dtype("u2").str.encode())
    for name in ("cache", "corpora", "documents", "filters", "pack", "prepare", "readers",
                 "records", "sources", "tokenizer"):  # fmt: skip
        digest.update(pathlib.Path(__file__).with_name(f"{name}.py").read_bytes())
    return digest.hexdigest()


def throttled(progress: Progress | None, seconds: float = 0.1) -> Progress:
    """Lets a call through when the last one is `seconds` ago, or when it says that all is done."""
    last = 0.0

    def report(done: int, total: int, note: str) -> None:
        nonlocal last
        now = time.monotonic()
        if progress and (now - last >= seconds or 0 < total <= done):
            last = now
            progress(done, total, note)

    return report


T = TypeVar("T")


def _result(future: concurrent.futures.Future[T], report: Progress, note: str) -> T:
    while True:
        try:
            return future.result(timeout=0.5)
        except concurrent.futures.TimeoutError:
            report(0, 0, note)


def _while_reporting(work: Callable[[], T], report: Progress, note: str) -> T:
    """Runs `work` in a thread, so that this one can say that it goes on."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return _result(pool.submit(work), report, note)

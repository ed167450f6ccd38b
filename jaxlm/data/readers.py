"""One reader a file format: path -> documents, malformed rows counted in the tally.

A reader is `(path, name, key, tally)`: `name` is the file's name in messages and documents, `key`
holds the text; where it is "", a document is the whole row, as JSON (`data.examples`). A damaged
file (not a damaged row) is a `ValueError`.
"""

import gzip
import json
import os
import pathlib
import re
import textwrap
import zlib
from collections.abc import Iterator

from jaxlm.data.documents import Document, Tally, cut
from jaxlm.data.examples import FIELDS, canonical

LONG, PART = 2**19, 2**15  # characters
LARGEST = 2**28  # bytes of an array, whose objects take several times that in memory
ARRAY = re.compile(rb"(\xef\xbb\xbf)?\s*\[\s*\{")  # the beginning of an array of objects
OBJECT = re.compile(r'\s*\{\s*("|\}\s*\Z)')  # the beginning of a JSON object, or an empty one


def kind(path: pathlib.Path) -> str:
    """The key into `READERS` that a file's name asks for."""
    name = path.name.lower()
    if name.endswith((".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")):
        return "jsonl"
    if name.endswith(".json"):
        return "json"
    if name.endswith((".parquet", ".pq")):
        return "parquet"
    if ".array_record" in name or ".arrayrecord" in name:  # shards end in -00000-of-00004
        return "array_record"
    return "text"


def read_text(path: pathlib.Path, name: str, key: str, tally: Tally) -> Iterator[Document]:
    """A file as one document; a file of more than `LONG` characters as parts of `PART`.

    Otherwise a book or a dump in one file would be wholly held out, or not at all.
    """
    if not key:
        raise ValueError(
            f"{path} is read as one text; chat, pairs and feedback, which this run asks it for, "
            "stand in rows: write them as JSON lines (.jsonl), Parquet or ArrayRecord, or choose a "
            "method that reads text"
        )
    tally.rows += 1
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        tally.bad(str(path), f"no UTF-8 text at byte {error.start}")
        return
    if "\0" in text:
        tally.bad(str(path), "a binary file")
        return
    if len(text) <= LONG:
        yield Document(name, text)
        return
    for number, part in enumerate(cut(text, PART), 1):
        yield Document(f"{name}#{number}", part)


def read_jsonl(path: pathlib.Path, name: str, key: str, tally: Tally) -> Iterator[Document]:
    """One JSON object a line; lines of white space are skipped."""
    number = 0
    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as lines:
        try:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield from _from_json(line, f"{path}:{number}", f"{name}:{number}", key, tally)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(
                f"{path} is damaged after line {number} ({error}); fetch or write it again."
            ) from None


def is_array(path: pathlib.Path, key: str) -> bool:
    """Whether a .json file is read as rows: an array of objects, the first of them with `key`."""
    with open(path, "rb") as file:
        head = file.read(2**16)
    return bool(ARRAY.match(head)) and (not key or json.dumps(key).encode() in head)


def read_json(path: pathlib.Path, name: str, key: str, tally: Tally) -> Iterator[Document]:
    """The objects of an array as rows; any other JSON as one text."""
    if not is_array(path, key):
        yield from read_text(path, name, key, tally)
        return
    remedy = f"write it with one object a line: jq -c '.[]' {path.name} > {path.stem}.jsonl"
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path} is one array of more than {LARGEST / 2**20:g} MiB; {remedy}")
    try:
        rows = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} begins as an array and is no JSON: {error}; {remedy}") from None
    for number, row in enumerate(rows, 1):
        tally.rows += 1
        yield from _from_row(row, f"{path}:{number}", f"{name}:{number}", key, tally)


def _from_json(line, where, name, key, tally) -> Iterator[Document]:
    tally.rows += 1
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        tally.bad(where, f"no JSON: {error}")
        return
    yield from _from_row(row, where, name, key, tally)


def _from_row(row, where, name, key, tally) -> Iterator[Document]:
    if not isinstance(row, dict):
        tally.bad(where, "not a JSON object")
        return
    if key and row and row.get(key) is None:
        has = ", ".join(textwrap.shorten(str(one), 20) for one in list(row)[:8])
        tally.bad(where, f"no text in {key!r}; the row has {has}")
        return
    yield from _checked(row.get(key) if key else _whole(row), where, name, key, tally)


def _whole(row) -> str:
    """A row as JSON, whatever kind of list or text its values are."""
    return canonical({key: row[key] for key in FIELDS if row.get(key) is not None} or row)


def _checked(text, where, name, key, tally) -> Iterator[Document]:
    """The document when `text` is a str that UTF-8 can hold."""
    if not isinstance(text, str):
        tally.bad(where, f"no text in {key!r}" if text is None else f"{key!r} is not a string")
        return
    try:
        text.encode()
    except UnicodeEncodeError:
        tally.bad(where, "half a surrogate pair, which UTF-8 cannot hold")
        return
    yield Document(name, text)


def read_parquet(path: pathlib.Path, name: str, key: str, tally: Tally) -> Iterator[Document]:
    """The column `key`, one document a row, a thousand rows in memory at a time."""
    import pyarrow
    import pyarrow.parquet

    try:
        opened = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is no readable Parquet file: {error}") from None
    with opened as table:
        columns = table.schema_arrow.names
        if key and key not in columns:
            raise ValueError(f"{path} has no column {key!r}; set text to one of {columns}.")
        wanted = [key] if key else [column for column in columns if column in FIELDS]
        if not key and not set(wanted) - {"system"}:
            raise ValueError(f"{path} has none of the columns {FIELDS}; there are {columns}.")
        number = 0
        for batch in table.iter_batches(batch_size=1024, columns=wanted):
            for value in batch.column(0) if key else batch.to_struct_array():
                number += 1
                tally.rows += 1
                try:
                    text = value.as_py() if key else _whole(value.as_py())
                except UnicodeDecodeError:
                    tally.bad(f"{path}:{number}", "no UTF-8 text")
                    continue
                yield from _checked(text, f"{path}:{number}", f"{name}:{number}", key, tally)


def read_array_record(path: pathlib.Path, name: str, key: str, tally: Tally) -> Iterator[Document]:
    """One document a record: a JSON object that has `key`, or plain UTF-8 text.

    What begins as JSON objects with a key do, with {", is held to be one: broken, or without `key`,
    it is malformed. Text that begins otherwise is plain text, "{x}" too.
    """
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(str(path))
    if not reader.ok():
        raise ValueError(f"{path} is no readable ArrayRecord file; write or fetch it again.")
    count = reader.num_records()
    for first in range(0, count, 1024):
        rows = range(first, min(first + 1024, count))
        for number, record in zip(rows, reader.read(list(rows)), strict=True):
            where, here = f"{path}:{number + 1}", f"{name}:{number + 1}"
            try:
                text = record.decode()
            except UnicodeDecodeError:
                tally.rows += 1
                tally.bad(where, "no UTF-8 text")
                continue
            if not key or OBJECT.match(text):
                yield from _from_json(text, where, here, key, tally)
            else:
                tally.rows += 1
                yield Document(here, text)
    reader.close()


def is_tfds_folder(source: str) -> bool:
    """Whether the path is a folder that TFDS wrote."""
    return (pathlib.Path(source).expanduser() / "dataset_info.json").is_file()


def _builder(source: str, name: str):
    import tensorflow_datasets as tfds

    try:
        if is_tfds_folder(source):
            return tfds.builder_from_directory(pathlib.Path(source).expanduser())
        folder = os.environ.get("TFDS_DATA_DIR")  # TFDS itself reads it only when imported
        builder = tfds.builder(source.removeprefix("tfds:"), data_dir=folder)
    except Exception as error:  # TFDS raises many kinds
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ValueError(f"source {name!r}: TFDS cannot load {source!r}: {reason}") from None
    if not builder.is_prepared():
        raise ValueError(
            f"source {name!r}: the TFDS data set {builder.info.full_name!r} is not in "
            f"{builder.data_dir}. Prepare it once with `tfds build {builder.info.full_name} "
            f"--file_format=array_record`, or set TFDS_DATA_DIR to where it is."
        )
    return builder


def tfds_files(source: str, name: str) -> list[pathlib.Path]:
    """The files of a TFDS data set, sorted."""
    here = is_tfds_folder(source)
    folder = pathlib.Path(source if here else _builder(source, name).data_dir).expanduser()
    return sorted(p for p in folder.iterdir() if p.is_file())


def tfds_rows(source: str, name: str, split: str, key: str, tally: Tally) -> Iterator[Document]:
    """The documents of one split, read without TensorFlow."""
    builder = _builder(source, name)
    if split not in builder.info.splits:
        raise ValueError(
            f"source {name!r}: {source} has no split {split!r}; there are "
            f"{list(builder.info.splits)}"
        )
    try:
        rows = builder.as_data_source(split=split)  # pyright: ignore[reportCallIssue]
    except NotImplementedError as error:
        raise ValueError(
            f"source {name!r}: {source} cannot be read by row ({error}); prepare it again with "
            f"--file_format=array_record."
        ) from None
    for number in range(len(rows)):
        tally.rows += 1
        row, where = rows[number], f"{source}/{split}:{number + 1}"
        if not key:
            yield from _checked(_whole(row), where, f"{split}:{number + 1}", key, tally)
            continue
        if key not in row:
            raise ValueError(
                f"source {name!r}: {source} has no {key!r}; set text to one of {list(row)}"
            )
        text = row[key]
        try:
            text = text.decode() if isinstance(text, bytes) else text
        except UnicodeDecodeError:
            tally.bad(where, "no UTF-8 text")
            continue
        yield from _checked(text, where, f"{split}:{number + 1}", key, tally)


READERS = {
    "text": read_text,
    "jsonl": read_jsonl,
    "json": read_json,
    "parquet": read_parquet,
    "array_record": read_array_record,
}

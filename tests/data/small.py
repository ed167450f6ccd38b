"""Small sources and prepared data for the tests of this folder."""

import json
import random

from jaxlm.data.prepare import DataSpec, Prepared, prepare
from jaxlm.data.sources import SourceSpec

WORDS = ["alpha", "beta", "def", "return", "für", "日本", "🎉", "x1", "\t", "\n\n", "  ", "()", "…"]


def texts(count: int, seed: int = 0, words: int = 60) -> list[str]:
    """Distinct texts in several scripts."""
    rng = random.Random(seed)
    return [f"{i} " + " ".join(rng.choices(WORDS, k=rng.randint(1, words))) for i in range(count)]


def write_jsonl(path, rows, key="text"):
    path.write_text("".join(json.dumps({key: row}) + "\n" for row in rows), encoding="utf-8")
    return path


def spec_of(folder, counts, **keys) -> DataSpec:
    """A mixture of JSON-lines files with that many documents, byte tokenizer, short rows."""
    sources = tuple(
        SourceSpec(name, str(write_jsonl(folder / f"{name}.jsonl", texts(count, seed))))
        for seed, (name, count) in enumerate(counts.items())
    )
    return DataSpec(sources, **({"tokenizer": "byte", "length": 16, "held_out": 0.1} | keys))


def prepared(folder, counts, **keys) -> Prepared:
    return prepare(spec_of(folder, counts, **keys), folder / "cache")

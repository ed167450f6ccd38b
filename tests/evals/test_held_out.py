"""Held-out figures: exact sums, and the text that primes xz is what was trained on."""

import numpy as np
import pytest

from jaxlm.data.prepare import prepare
from jaxlm.data.sources import SourceSpec
from jaxlm.data.spec import DataSpec
from jaxlm.evals.held_out import held_out_source
from jaxlm.observe import training_text


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    for n in range(40):
        text = "".join(map(chr, rng.integers(97, 123, rng.integers(5, 300))))
        (folder / f"{n:02}.txt").write_text(text)
    spec = DataSpec((SourceSpec("a", str(folder)),), tokenizer="byte", length=16, held_out=0.3)
    return prepare(spec, tmp_path_factory.mktemp("cache")), folder


def test_what_primes_xz_is_the_training_text(prepared):
    found, folder = prepared
    (source,) = found.sources
    held = {document.name for document in source.held_out}
    every = {path.name: path.read_text() for path in sorted(folder.iterdir())}
    trained = [text for name, text in every.items() if not any(name in h for h in held)]
    text = training_text(found, source)
    assert len(text) == sum(map(len, trained))
    assert all(t in text for t in trained)


def test_held_out_documents_are_whole_and_limited(prepared):
    found, _ = prepared
    (source,) = found.sources
    whole = held_out_source(source.held_out, found.tokenizer, 16, 8, 10**9)
    assert whole.characters == sum(len(d.text) for d in source.held_out)
    assert whole.rows.batch["weights"].sum() == sum(len(ids) - 1 for ids in whole.ids)
    some = held_out_source(source.held_out, found.tokenizer, 16, 8, 300)
    assert 0 < len(some.texts) < len(whole.texts)

"""A TFDS folder and a TFDS name, read without TensorFlow."""

import pathlib
import sys

import numpy as np
import pytest
from small import texts

from jaxlm.data import sources
from jaxlm.data.documents import Tally
from jaxlm.data.sources import SourceSpec

TEXTS = texts(7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data set of one text feature, written by TFDS itself."""
    import tensorflow_datasets as tfds

    class TinyText(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        RELEASE_NOTES = {"1.0.0": "first"}  # noqa: RUF012
        pkg_dir_path = tmp_path_factory.mktemp("package")

        def _info(self):
            features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "n": np.int64})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            yield from ((i, {"text": text, "n": i}) for i, text in enumerate(TEXTS))

    builder = TinyText(data_dir=tmp_path_factory.mktemp("tfds"), file_format="array_record")
    builder.download_and_prepare()
    return builder.data_dir


def read(source, **keys):
    spec = SourceSpec("s", str(source), **keys)
    return [document.text for document in sources.read(spec, Tally(), 0.0)]


def test_a_tfds_folder(folder):
    assert sorted(read(folder)) == sorted(TEXTS)
    assert len(sources.fingerprint(SourceSpec("s", str(folder)))) == 64
    assert "tensorflow" not in sys.modules


def test_a_tfds_name(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(pathlib.Path(folder).parents[1]))
    assert sorted(read("tfds:tiny_text")) == sorted(TEXTS)
    assert len(sources.fingerprint(SourceSpec("s", "tfds:tiny_text"))) == 64
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(ValueError, match=r"'tiny_text/1.0.0' is not in .*tfds build tiny_text"):
        read("tfds:tiny_text")


def test_errors_name_what_there_is(folder):
    with pytest.raises(ValueError, match=r"has no split 'test'; there are \['train'\]"):
        read(folder, split="test")
    with pytest.raises(ValueError, match=r"has no 'body'; set text to one of"):
        read(folder, text="body")


def test_a_name_that_is_not_prepared_says_how_to(monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(ValueError, match="tfds:"):
        read("tfds:no_such_data_set_at_all")

"""Which tokenizer and chat template a model gets whose adapter brings its own."""

import json
import re

import pytest

from jaxlm.data import chat, handed_on
from jaxlm.data import tokenizer as tokenizers

ONE, TWO = "{{ messages[0].content }}!", "{{ messages[0].content }}?"


def a_folder(path, tokenizer=True, template="", **config):
    path.mkdir()
    if tokenizer:
        tokenizers.save_byte(path)
        file = path / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
    if template:
        (path / chat.FILE).write_text(template)
    return path


@pytest.mark.parametrize(
    ("of_model", "of_adapter", "taken", "said"),
    [
        ("", "", "", []),
        (ONE, "", ONE, []),
        (ONE, ONE, ONE, []),
        ("", ONE, ONE, ["template is the adapter's, .* the model has none"]),
        (ONE, TWO, TWO, ["template is the adapter's, .* the model has another"]),
    ],
)
@pytest.mark.parametrize("tokenizer", [True, False])
def test_the_template_that_an_adapter_was_trained_with(
    of_model, of_adapter, taken, said, tokenizer, tmp_path
):
    base = a_folder(tmp_path / "base", template=of_model)
    adapter = a_folder(tmp_path / "adapter", tokenizer, of_adapter)
    notes = handed_on.with_adapter(base, adapter, tmp_path / "out")
    assert chat.of_folder(tmp_path / "out") == taken
    assert tokenizers.load(tmp_path / "out").hash == tokenizers.load(base).hash
    assert len(notes) == len(said)
    for note, pattern in zip(notes, said, strict=True):
        assert re.search(pattern, note)


def test_a_template_in_the_tokenizer_s_configuration_counts(tmp_path):
    base = a_folder(tmp_path / "base", template=ONE)
    adapter = a_folder(tmp_path / "adapter", chat_template=TWO)
    handed_on.with_adapter(base, adapter, tmp_path / "out")
    assert chat.of_folder(tmp_path / "out") == TWO


def test_another_tokenizer_is_the_adapter_s_and_it_is_said(tmp_path):
    base = a_folder(tmp_path / "base", template=ONE)
    adapter = a_folder(tmp_path / "adapter", eos_token=tokenizers.BOS)
    (note,) = handed_on.with_adapter(base, adapter, tmp_path / "out")
    assert "the model's gives text other ids" in note
    assert tokenizers.load(tmp_path / "out").eos == tokenizers.load(adapter).eos == 256
    assert chat.of_folder(tmp_path / "out") == ONE, "the adapter has none of its own"


def test_a_model_without_tokenizer_gets_the_adapter_s(tmp_path):
    base, adapter = a_folder(tmp_path / "base", False), a_folder(tmp_path / "adapter")
    (note,) = handed_on.with_adapter(base, adapter, tmp_path / "out")
    assert "the model has none" in note
    assert tokenizers.load(tmp_path / "out").vocabulary_size == 258


def test_the_tokenizer_of_a_run_puts_bos_before_a_text_by_itself(tmp_path):
    (tmp_path / "run").mkdir()
    a_folder(tmp_path / "run" / "tokenizer", template=ONE)
    (tmp_path / "out").mkdir()
    handed_on.of_run(tmp_path / "run", tmp_path / "out")
    assert chat.of_folder(tmp_path / "out") == ONE
    backend = tokenizers.load(tmp_path / "out").backend
    assert backend.encode("a").ids == [256, ord("a")]

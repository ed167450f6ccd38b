"""Tokenizers: text comes back, special tokens are never read out of text, errors are clear."""

import json
import pathlib

import pytest
from small import texts

from jaxlm.data import chat, documents, tokenizer

HARD = [
    "",
    " ",
    "\n\t \r\n  ",
    "héllo 日本 🎉 é\u0000\ufeff",
    f"spelled out: {tokenizer.BOS} and {tokenizer.EOS}",
    "".join(chr(i) for i in range(0x300)),
    "👩‍👩‍👧‍👦 flags 🇫🇷",
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    tokenizer.train_bpe(texts(200), 400, root / "bpe")
    tokenizer.save_byte(root / "byte")
    return root


@pytest.fixture(scope="module", params=["bpe", "byte"])
def both(request, folders):
    return tokenizer.load(folders / request.param, request.param)


def test_decoding_gives_the_text_back(both):
    for text, ids in zip(HARD, both.encode_batch(HARD), strict=True):
        assert both.decode(ids) == text
        assert both.bos not in ids
        assert both.eos not in ids
        assert both.is_lossless(text)


def test_special_tokens_leave_no_trace(both):
    assert both.decode([both.bos, *both.encode("a b"), both.eos]) == "a b"


def test_pieces_join_to_the_text(both):
    for text in HARD:
        pieces = both.pieces(text)
        assert "".join(piece for _, piece in pieces) == text
        assert [i for i, _ in pieces] == both.encode(text)


@pytest.mark.parametrize("place", ["chat_template.jinja", "chat_template.json"])
def test_a_copy_has_the_chat_templates_wherever_they_are(folders, tmp_path, place):
    source, target = tmp_path / "source", tmp_path / "target"
    tokenizer.copy(folders / "byte", source)
    said = "{{ messages }}"
    (source / place).write_text(
        said if place.endswith("jinja") else f'{{"chat_template": "{said}"}}'
    )
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    (source / "model.safetensors").touch()
    for _ in range(2):  # a run that goes on copies again
        tokenizer.copy(source, target)
    assert chat.of_folder(target) == said
    assert (target / "additional_chat_templates" / "tool_use.jinja").read_text() == "tools"
    names = lambda folder: {path.relative_to(folder) for path in folder.rglob("*")}
    assert names(source) - names(target) == {pathlib.Path("model.safetensors")}


def test_byte_ids_are_the_bytes(folders):
    byte = tokenizer.load(folders / "byte", "byte")
    assert byte.encode("aé") == [97, 0xC3, 0xA9]
    assert (byte.bos, byte.eos, byte.vocabulary_size) == (256, 257, 258)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bpe", "byte"])
def test_who_gets_the_tokenizer_has_bos_before_a_text(folders, tmp_path, name):
    import transformers

    tokenizer.copy(folders / name, tmp_path)
    for _ in range(2):
        tokenizer.begin_with_bos(tmp_path)
        ours, theirs = (
            tokenizer.load(tmp_path),
            transformers.AutoTokenizer.from_pretrained(tmp_path),
        )
        assert theirs("a b")["input_ids"] == [ours.bos, *ours.encode("a b")]
        assert theirs.decode(theirs("a b")["input_ids"], skip_special_tokens=True) == "a b"
    assert ours.encode("a b") == tokenizer.load(folders / name).encode("a b")


def test_training_is_deterministic_and_makes_the_size_asked_for(folders, tmp_path):
    tokenizer.train_bpe(texts(200), 400, tmp_path)
    again, first = tokenizer.load(tmp_path), tokenizer.load(folders / "bpe")
    assert again.hash == first.hash
    assert first.vocabulary_size == 400


def test_a_long_text_is_cut_without_a_trace(both, monkeypatch):
    monkeypatch.setattr(tokenizer, "LONGEST", 50)
    text = "line of text\n" * 20 + "x" * 120
    assert both.decode(both.encode(text)) == text


def test_cut_keeps_every_character():
    pieces = documents.cut("ab\ncdefg\nh", 4)
    assert pieces == ["ab\n", "cdef", "g\n", "h"] or "".join(pieces) == "ab\ncdefg\nh"
    assert max(map(len, pieces)) <= 4


@pytest.mark.slow
def test_transformers_loads_what_we_save(folders):
    from transformers import AutoTokenizer

    for name in ("bpe", "byte"):
        ours, theirs = (
            tokenizer.load(folders / name),
            AutoTokenizer.from_pretrained(folders / name),
        )
        for text in HARD[:4]:
            assert theirs.encode(text) == ours.encode(text)
            assert theirs.decode(ours.encode(text)) == text
        assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos, ours.eos)


def test_a_folder_with_only_eos_uses_it_for_both(folders, tmp_path):
    content = (folders / "bpe" / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(content)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": {"content": tokenizer.EOS}})
    )
    found = tokenizer.load(tmp_path)
    assert found.bos == found.eos == 1


@pytest.mark.slow  # imports transformers
@pytest.mark.parametrize("model_type", ["qwen3", "gemma2", "gpt_neox", "llama"])
def test_no_tokenizer_is_made_up(tmp_path, model_type):
    (tmp_path / "config.json").write_text(f'{{"model_type": "{model_type}"}}')
    with pytest.raises(ValueError, match="no tokenizer can be loaded") as told:
        tokenizer.load(tmp_path)
    assert "copy the model's" in str(told.value)


def test_errors_say_what_to_do(tmp_path, folders):
    with pytest.raises(
        ValueError, match=r"no folder of a tokenizer .* data\.tokenizer is 'bpe', 'byte', or"
    ):
        tokenizer.load(tmp_path / "absent")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be read"):
        tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((folders / "byte" / "tokenizer.json").read_bytes())
    with pytest.raises(ValueError, match="neither a bos nor an eos"):
        tokenizer.load(tmp_path)
    for half in ('{"bos_token":', "[]"):
        (tmp_path / "tokenizer_config.json").write_text(half)
        with pytest.raises(ValueError, match=r"tokenizer_config\.json cannot be read: it has to"):
            tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match="at least 256 bytes"):
        tokenizer.train_bpe([], 100, tmp_path)

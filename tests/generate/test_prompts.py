"""Prompts from files and conversations, and what is wrong with them in one sentence."""

import json

import pytest

from jaxlm.data import tokenizer as tokenizers
from jaxlm.generate.prompts import Prompt, chat_template, encoded, from_file

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'nobody' %}"
    "{{ raise_exception('who is nobody?') }}{% endif %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def folder(tmp_path):
    """Of the tokenizer whose ids are bytes; bos is 256 and eos 257."""
    tokenizers.save_byte(tmp_path)
    return tmp_path


def with_template(folder):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": TEMPLATE}))


def test_lines_of_text(tmp_path):
    path = tmp_path / "asked.txt"
    path.write_text("one\n two €\n\n")
    assert from_file(path) == [Prompt("one"), Prompt(" two €"), Prompt("")]


def test_lines_of_json(tmp_path):
    path = tmp_path / "asked.jsonl"
    messages = [{"role": "user", "content": "hi"}]
    rows = {"prompt": "a\nb", "more": 1}, {"messages": messages}
    path.write_text("\n\n".join(map(json.dumps, rows)))
    assert from_file(path) == [Prompt("a\nb"), Prompt(messages=messages)]


ASKED = [{"role": "user", "content": "hi"}]
SYSTEM = [{"role": "system", "content": "be kind"}]
ANSWER = [{"role": "assistant", "content": "yes"}]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "a"}, Prompt("a")),
        ({"prompt": ASKED}, Prompt(messages=ASKED)),
        ({"instruction": "hi", "output": "yes", "text": "hi: yes"}, Prompt(messages=ASKED)),
        ({"prompt": "hi", "system": "be kind"}, Prompt(messages=[*SYSTEM, *ASKED])),
        ({"messages": ASKED, "system": "be kind"}, Prompt(messages=[*SYSTEM, *ASKED])),
        ({"conversations": [{"from": "human", "value": "hi"}]}, Prompt(messages=ASKED)),
        ({"messages": [*ASKED, *ANSWER, *ASKED]}, Prompt(messages=[*ASKED, *ANSWER, *ASKED])),
    ],
)
def test_rows_are_read_as_training_reads_them(tmp_path, row, expected, capsys):
    (tmp_path / "asked.jsonl").write_text(json.dumps(row))
    assert from_file(tmp_path / "asked.jsonl") == [expected]
    assert capsys.readouterr().err == ""


def test_the_answer_at_the_end_is_left_out_and_said_once(tmp_path, capsys):
    row = json.dumps({"messages": [*ASKED, *ANSWER]})
    (tmp_path / "asked.jsonl").write_text(f"{row}\n{row}\n")
    assert from_file(tmp_path / "asked.jsonl") == [Prompt(messages=ASKED)] * 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "2 conversations end with an answer" in line


@pytest.mark.parametrize("mark", ["\u2028", "\x85", "\x0c"])
def test_a_prompt_may_hold_what_unicode_calls_the_end_of_a_line(tmp_path, mark):
    (tmp_path / "asked.txt").write_text(f"a{mark}b\nc\n", encoding="utf-8")
    assert from_file(tmp_path / "asked.txt") == [Prompt(f"a{mark}b"), Prompt("c")]
    row = json.dumps({"prompt": f"a{mark}b"}, ensure_ascii=False)
    (tmp_path / "asked.jsonl").write_text(f"{row}\n", encoding="utf-8")
    assert from_file(tmp_path / "asked.jsonl") == [Prompt(f"a{mark}b")]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no prompt"),
        ('{"prompt": "a"}\n{"prompt"', "asked.jsonl:2 is no JSON"),
        ("[1]", "asked.jsonl:1 is no JSON object"),
        ('{"other": "a"}', "asked.jsonl:1 has neither.*the row has other"),
        ('{"messages": [{"role": "usr", "content": "a"}]}', "the role 'usr' is none of"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "nothing is asked"),
        ('{"prompt": 1}', "neither a prompt, a text, nor messages"),
        ('{"messages": []}', "neither"),
        ('{"messages": [{"role": "user"}]}', "neither"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(tmp_path, text, words):
    (tmp_path / "asked.jsonl").write_text(text)
    with pytest.raises(ValueError, match=words):
        from_file(tmp_path / "asked.jsonl")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        from_file(tmp_path / "asked.txt")


def test_texts_begin_with_bos(folder):
    tokenizer = tokenizers.load(folder)
    prompts = [Prompt("ab"), Prompt("")]
    assert encoded(prompts, tokenizer, folder, behind_bos=True) == [[256, 97, 98], [256]]


@pytest.mark.slow
def test_a_conversation_goes_through_the_template(folder):
    tokenizer = tokenizers.load(folder)
    with pytest.raises(ValueError, match="no chat template"):
        chat_template(tokenizer, folder, today=True)
    with_template(folder)
    said = Prompt(messages=[{"role": "user", "content": "hi"}])
    first, second = encoded([said, Prompt("x")], tokenizer, folder, behind_bos=True)
    assert first == [256, *b"[user]hi[assistant]"]
    assert second == [256, *b"x"]
    nobody = Prompt(messages=[{"role": "nobody", "content": "hi"}])
    with pytest.raises(ValueError, match="refuses these messages: who is nobody"):
        encoded([nobody], tokenizer, folder, behind_bos=True)


@pytest.mark.slow
def test_a_tokenizer_without_bos_puts_nothing_before_a_text(folder):
    tokenizer = tokenizers.load(folder)
    prompts = [Prompt("ab"), Prompt("")]
    assert encoded(prompts, tokenizer, folder, behind_bos=False) == [[97, 98], [256]]
    path = folder / "tokenizer.json"
    before = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|bos|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
    }
    before |= {"pair": [*before["single"], {"Sequence": {"id": "B", "type_id": 1}}]}
    before["special_tokens"] = {"<|bos|>": {"id": "<|bos|>", "ids": [256], "tokens": ["<|bos|>"]}}
    path.write_text(json.dumps({**json.loads(path.read_text()), "post_processor": before}))
    assert encoded(prompts, tokenizer, folder, behind_bos=False) == [[256, 97, 98], [256]]


def test_a_mark_in_front_and_windows_line_ends_are_no_part_of_a_prompt(tmp_path):
    for name, line in (("asked.txt", "one"), ("asked.JSONL", '{"prompt": "one"}')):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + f"{line}\r\n{line}\r\n".encode())
        assert from_file(tmp_path / name) == [Prompt("one")] * 2


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("asked.json", '[{"prompt": "one"}]', "rename it"),
        ("asked.jsonl", '{"prompt": "a\\ud800"}', "prompt 1 of .*half a surrogate pair"),
        (
            "asked.jsonl",
            '{"messages": [{"role": "user", "content": "\\udc00"}]}',
            "half a surrogate pair",
        ),
        ("asked.jsonl", '{"prompt": "one"}\n{"prompt', "asked.jsonl:2 is no JSON"),
        ("asked.jsonl", "", "holds no prompt"),
    ],
)
def test_what_is_no_prompt_is_told(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=words):
        from_file(tmp_path / name)


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("tokenizer_config.json", '{"bos_token": 3}', "tokenizer_config.json says bos_token=3"),
        ("special_tokens_map.json", '["bos"]', "special_tokens_map.json cannot be read"),
        ("special_tokens_map.json", "{", "special_tokens_map.json cannot be read"),
        ("tokenizer_config.json", '{"eos_token": "<|eos|>", "model_max_length": "a"}', "no token"),
        ("tokenizer.json", "{}", r"tokenizer.json cannot be read"),
        ("tokenizer.json", "", r"tokenizer.json cannot be read"),
    ],
)
def test_the_file_of_a_tokenizer_that_is_odd_is_named(folder, file, text, words):
    (folder / file).write_text(text)
    with pytest.raises(ValueError, match=words):
        encoded([Prompt("a")], tokenizers.load(folder), folder, behind_bos=False)


@pytest.mark.parametrize("odd", [3, True, {"a": 1}, [3], [{"name": "a"}], [{"name": ["a"]}]])
def test_a_template_that_is_none_is_told(folder, odd):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": odd}))
    with pytest.raises(ValueError, match="neither a text nor a list"):
        chat_template(tokenizers.load(folder), folder, today=True)


def test_a_template_of_another_encoding_is_told_by_its_file(folder):
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"^\S*chat_template.jinja cannot be read"):
        chat_template(tokenizers.load(folder), folder, today=True)

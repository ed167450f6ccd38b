"""What the command writes, and when: the model's answers are made up."""

import json
import sys
from types import SimpleNamespace

import jax
import pytest

from jaxlm import openflags
from jaxlm.data import tokenizer as tokenizers
from jaxlm.generate import __main__ as command
from jaxlm.generate.engine import Generator, Result


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function of flags; all answers are "!", but for those that `failing` is in."""
    tokenizers.save_byte(tmp_path)
    (tmp_path / "run.json").touch()

    class Fake(Generator):
        def __init__(self, lm, context, decode, ends, *, rows):
            self.context = context

        def __call__(self, params, requests, sampling, **options):
            if [*b"failing"] in [request.ids[1:] for request in requests]:
                raise KeyboardInterrupt
            return [Result([33], "!", [], "length")] * len(requests)

    opened = SimpleNamespace(
        lm=None,
        params=None,
        tokenizer=tokenizers.load(tmp_path),
        mesh=jax.make_mesh((1,), ("data",), devices=jax.devices()[:1]),
        length=64,
        folder=tmp_path,
        ends=frozenset({257}),
    )
    monkeypatch.setattr(command, "Generator", Fake)
    monkeypatch.setattr(openflags, "open_model", lambda *_, **__: opened)
    monkeypatch.setattr(command, "PART", 2)

    def main(**flags):
        given = [f"--{key}={value}" for key, value in flags.items()]
        monkeypatch.setattr(sys, "argv", ["generate", f"--checkpoint={tmp_path}", *given])
        return command.main()

    return main


def test_an_empty_prompt_has_several_samples(run, capsys):
    run(samples=2)
    assert capsys.readouterr().out == "── 1\n!\n── 2\n!\n"


def test_prompts_may_be_given_one_by_one(run, tmp_path, monkeypatch, capsys):
    given = ["generate", f"--checkpoint={tmp_path}", "--prompt=one", "--prompt=two"]
    monkeypatch.setattr(sys, "argv", given)
    command.main()
    assert capsys.readouterr().out == "── 1\none!\n── 2\ntwo!\n"


def test_prompts_are_compared_before_the_model_is_opened(run, tmp_path, monkeypatch):
    def differ(what, value):
        raise ValueError(f"{what}: {[prompt.text for prompt in value]}")

    asked = tmp_path / "asked.txt"
    asked.write_text("one\ntwo\n")
    changes = {"place": lambda: True, "join": lambda *_: None, "agree": differ}
    for name, change in changes.items():
        monkeypatch.setattr(command.cluster, name, change)
    monkeypatch.setattr(command.process, "hush_libraries", lambda: None)
    monkeypatch.setattr(openflags, "open_model", None)
    with pytest.raises(ValueError, match=r"what --prompts holds: \['one', 'two'\]"):
        run(prompts=asked)


def test_of_several_answers_each_says_whose_it_is(run, tmp_path, capsys):
    asked = tmp_path / "asked.txt"
    asked.write_text("one\ntwo\n")
    run(prompts=asked)
    assert capsys.readouterr().out == "── 1\none!\n── 2\ntwo!\n"
    record = {"messages": [{"role": "user", "content": "What is\n3 + 4? " + 50 * "Well? "}]}
    said = command.heading(3, record)
    assert said.startswith("── 3 What is 3 + 4? Well?")
    assert said.endswith(" …")


def test_the_help_says_what_is_usual(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["generate", "--help"])
    with pytest.raises(SystemExit):
        command.main()
    said = " ".join(capsys.readouterr().out.split())
    for flag, usual in (("top_p", 1.0), ("rows", 32), ("temperature", 0.8)):
        assert f"(default: {usual})" in said.partition(f" --{flag} {flag.upper()} ")[2][:99]


def test_answers_are_in_a_file_before_all_are_there(run, tmp_path):
    asked, answers = tmp_path / "asked.txt", tmp_path / "answers.jsonl"
    asked.write_text("one\n\nfailing\n")
    with pytest.raises(KeyboardInterrupt):
        run(prompts=asked, output=answers)
    assert not answers.exists()
    kept = (tmp_path / "answers.jsonl.part").read_text().splitlines()
    assert [json.loads(line)["prompt"] for line in kept] == ["one", ""]
    asked.write_text("one\ntwo\nthree\n")
    run(prompts=asked, output=answers)
    assert [json.loads(line)["prompt"] for line in answers.read_text().splitlines()] == [
        "one",
        "two",
        "three",
    ]
    assert not (tmp_path / "answers.jsonl.part").exists()


def test_a_prompt_that_is_too_long_is_named_before_anything_is_written(run, tmp_path):
    asked, answers = tmp_path / "asked.txt", tmp_path / "answers.jsonl"
    asked.write_text("one\ntwo\n" + "x" * 64)
    with pytest.raises(ValueError, match="prompt 3 has 65 tokens"):
        run(prompts=asked, output=answers, samples=2)
    assert not list(tmp_path.glob("answers*"))


@pytest.mark.parametrize(
    ("place", "words"),
    [("", "is a folder"), ("no/file", "there is no"), ("a.jsonl", "is there already")],
)
def test_an_output_that_cannot_be_written_is_refused(tmp_path, place, words):
    (tmp_path / "a.jsonl").touch()
    flags = command._flags().parse_args(["--checkpoint=x", f"--output={tmp_path}/{place}"])
    with pytest.raises(ValueError, match=words):
        command._checked(flags)


def test_what_may_not_be_meant_is_noted():
    noted = lambda *flags: list(
        command._notes(command._flags().parse_args(["--checkpoint=x", *flags]))
    )
    assert not noted("--stop=\n\n", "--stop=\\\\", "--temperature=0")
    (note,) = noted("--stop=\\n\\n")
    assert "--stop=$'\\n\\n'" in note
    (note,) = noted("--temperature=0", "--samples=3")
    assert "all 3 samples" in note


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--tokens=0", "--tokens=0 must be at least 1"),
        ("--samples=0", "--samples=0 must be at least 1"),
        ("--samples=100000000", "100,000,000 answers, more than the 10,000,000"),
        ("--temperature=-1", "--temperature=-1.0 has to be at least 0 and finite"),
        ("--temperature=nan", "--temperature=nan has to be"),
        ("--temperature=inf", "--temperature=inf has to be"),
        ("--top_p=2", "--top_p=2.0 has to be at least 0 and at most 1"),
        ("--stop=", "--stop is empty"),
        ("--max_length=-1", "--max_length=-1 must be at least 0"),
        ("--system=Be kind.", "give --chat too"),
        ("--prompt=\udcff", "half a surrogate pair"),
    ],
)
def test_flags_that_mean_nothing_are_refused(flag, words):
    with pytest.raises(ValueError, match=words):
        command._checked(command._flags().parse_args(["--checkpoint=x", flag]))


def test_more_tokens_than_can_be_counted_are_refused(run):
    with pytest.raises(ValueError, match="prompt 1 asks for 3,000,000,000 tokens"):
        run(tokens=3_000_000_000)


def test_a_message_of_the_system_stands_before_each_conversation(tmp_path):
    words = ["--checkpoint=x", "--system=Be kind."]
    asked = lambda *more: [
        prompt.messages
        for prompt in command._checked(command._flags().parse_args([*words, *more]))[1]
    ]
    system, own = {"role": "system", "content": "Be kind."}, {"role": "system", "content": "Be."}
    user = {"role": "user", "content": "one"}
    assert asked("--chat", "--prompt=one") == [[system, user]]
    file = tmp_path / "asked.jsonl"
    file.write_text("\n".join(json.dumps({"messages": m}) for m in ([user], [own, user])))
    assert asked(f"--prompts={file}") == [[system, user], [own, user]]

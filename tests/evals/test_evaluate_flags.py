"""`jaxlm.evaluate`: flags that mean nothing are refused, and files hold what is true."""

import json
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import openflags
from jaxlm.evals.length import Limited
from jaxlm.evaluate import __main__ as command
from jaxlm.evaluate import compress, lengths, write
from jaxlm.evaluate.answers import file_of
from tests.evals.judges import favourable


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--min_k=nan", "a share in percent"),
        ("--limit=nan", "must be a number above 0"),
        ("--limit=inf", "must be a number above 0"),
        ("--stride=2000", "would leave tokens unscored"),
        ("--window=0", "must be at least 1"),
        ("--scales=1,2", "above 0 and up to 1"),
        ("--scales=", "above 0 and up to 1"),
        ("--max_tokens=0", "must be at least 1"),
        ("--gen_kwargs=temperature=1,top", "'top' is no NAME=VALUE"),
        ("--max_length=-1", "must be at least 0"),
        ("--devices=-1", "must be at least 0"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(flag, words):
    flags = command._flags().parse_args(["--checkpoint=x", "--compression=y", flag])
    with pytest.raises(ValueError, match=words):
        command._refuse(flags)


def test_more_devices_than_there_are_are_refused():
    flags = command._flags().parse_args(["--checkpoint=x", "--devices=999"])
    with pytest.raises(ValueError, match="--devices=999: this machine has"):
        openflags.opened(flags, print, every=True)


def test_files_of_results_say_how_the_model_was_opened():
    words = ["--checkpoint=x", "--dtype=bfloat16", "--max_length=9", "--devices=1"]
    parse = lambda *words: command._flags().parse_args(words)
    of_run, other = SimpleNamespace(step=20), SimpleNamespace(step=None)
    assert openflags.told(parse(*words), other) == {"dtype": "bfloat16", "max_length": 9}
    assert openflags.told(parse(words[0]), of_run) == {"step": 20, "params": "params"}
    ema = parse(words[0], "--params=ema")
    assert openflags.told(ema, of_run) == {"step": 20, "params": "ema"}
    assert openflags.told(parse(words[0]), other) == {}


def test_samples_that_would_be_written_nowhere_are_refused(tmp_path):
    parse = lambda *flags: command._flags().parse_args([f"--checkpoint={tmp_path}", *flags])
    asked = ("--compression=y", "--log_samples")
    with pytest.raises(ValueError, match=r"--log_samples: .* say where to with --output=FOLDER"):
        command._refuse(parse(*asked))
    command._refuse(flags := parse(*asked, f"--output={tmp_path / 'here'}"))
    assert command._destination(flags) == tmp_path / "here"
    (tmp_path / "run.json").touch()
    command._refuse(flags := parse(*asked))
    assert command._destination(flags) == tmp_path / "evaluations"


def test_a_judge_is_a_function_of_ones_own():
    assert lengths.judge_of("tests.evals.judges:favourable") is favourable
    for name, words in (
        ("favourable", "package.module:function"),
        ("tests.evals.judges:other", "has no attribute 'other'"),
        ("no_such_module:f", "No module named 'no_such_module'"),
        ("tests.evals.judges:__name__", "cannot be called"),
    ):
        with pytest.raises(ValueError, match=words):
            lengths.judge_of(name)
    with pytest.raises(ValueError, match="1 of the 2 prompts of f have none"):
        lengths.require_baselines([Limited("a", 3, "x"), Limited("b", 3)], "f")


class Echo:
    """A model that answers with as many words as its prompt has tokens."""

    length = 3

    class texts:
        class tokenizer:
            def decode(ids, skip_special_tokens):
                assert skip_special_tokens
                return " ".join(map(str, ids))

    def generate(prompts):
        assert all(prompt.sampling == {"temperature": 0.0} for prompt in prompts)
        return [prompt.ids[: prompt.tokens] for prompt in prompts]


def test_limits_are_measured_on_the_models_own_answers():
    asked = [Limited("a", 4, "x"), Limited("b", 2, "y")]
    encode = lambda texts: [[1] * 3 for _ in texts]
    options = {"tokens": 3, "judge": favourable}
    figures, rows = lengths.measure(Echo, asked, encode, scale=1.0, **options)
    assert (figures["violations"], figures["words"], figures["wins"]) == (0.5, 3.0, 0.5)
    assert figures["cut_off"] == 1.0
    assert [row["violated"] for row in rows] == [False, True]
    assert rows[1] | {"limit": 2, "response": "1 1 1", "points": 0.0} == rows[1]
    half, _ = lengths.measure(Echo, asked, encode, scale=0.5, tokens=9, judge=None)
    assert (half["violations"], half["cut_off"], half["wins"]) == (1.0, 0.0, None)
    assert lengths.row(half)[0] == "×0.5"
    with pytest.raises(ValueError, match=r"longest prompt has 4 tokens, more than .* context of 3"):
        lengths.measure(Echo, asked, lambda texts: [[1] * 4], scale=1.0, **options)
    assert [len(lengths.some(asked, n)) for n in (None, 1, 7, 0.5, 0.01)] == [2, 1, 2, 1, 1]


@pytest.mark.parametrize("below", ["", "/more", "/more/and more"])
def test_results_that_cannot_be_written_are_refused_before_anything_is_scored(tmp_path, below):
    (tmp_path / "file").write_text("x")
    words = ["--checkpoint=x", "--compression=y", f"--output={tmp_path}/file{below}"]
    with pytest.raises(ValueError, match="is no folder"):
        command._refuse(command._flags().parse_args(words))
    write.require_folder(tmp_path / "new" / "one")


def test_no_file_holds_nan(tmp_path):
    odd = {"a": np.float32("nan"), "b": [float("inf")], "c": np.int64(3)}
    path = write.corpora(tmp_path, {"x": odd}, {}, {})
    refuse = lambda text: pytest.fail(f"{text} is no JSON")
    found = json.loads(path.read_text(), parse_constant=refuse)
    assert found["compression"]["x"] == {"a": "nan", "b": ["inf"], "c": 3}


def test_documents_that_are_too_long_are_passed_over(tmp_path):
    path = tmp_path / "a.jsonl"
    texts = ["a" * 10, "b" * 99, "c" * 45, "d" * 99, "e" * 9]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (spec,) = compress.specs(str(path), "text", "")
    read = lambda most: [len(d.text) for d in compress.read(spec, most, print)]
    assert read(100) == [10, 45]  # and ends, since half of them is there
    assert read(5) == [10]
    assert read(0) == [len(text) for text in texts]


def test_a_wrong_key_is_told_with_those_that_there_are(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "why?", "answer": "so"}\n')
    (spec,) = compress.specs(str(path), "text", "")
    with pytest.raises(ValueError, match=r"no text in 'text'; the row has question, answer"):
        compress.read(spec, 0, print)


def test_each_model_has_its_own_file_of_answers():
    params = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(4, jnp.bfloat16)}
    others = [params | {"a": params["a"].at[1, 2].add(1e-3)}, params | {"a": params["a"][::-1]}]
    others.append(params | {"b": params["b"].astype(jnp.float32)})  # --dtype=float32
    names = [file_of("f", *args) for args in ((params, 9), (params, 8), *((p, 9) for p in others))]
    assert file_of("f", params, 9) == names[0]
    assert len(set(names)) == 5
    assert all(name.startswith("f-") for name in names)

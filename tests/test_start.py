"""What a run starts from: `init.checkpoint` is a model of the same options and the same tokens."""

import json
import re
from types import SimpleNamespace

import pytest
from tiny import get_config

from jaxlm.config import check, nest
from jaxlm.data import tokenizer
from jaxlm.folder import claim
from jaxlm.start import require_same_tokens, start_of


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """A work folder as a run leaves it, but for its params."""
    monkeypatch.setenv("JAXLM_TEST_TEXT", str(tmp_path))
    folder = tmp_path / "finished"
    folder.mkdir()
    (folder / "checkpoints" / "20").mkdir(parents=True)
    tokenizer.save_byte(folder / "tokenizer")
    saved = {"config": nest(check(get_config()).config)}
    (folder / "run.json").write_text(json.dumps(saved))
    return folder


def begun(folder, **model):
    c = get_config()
    c.init.checkpoint = str(folder)
    c.model.update(**model)
    return check(c)


def test_the_same_model_may_be_started_from(finished):
    for folder in (finished, finished / "checkpoints" / "20"):
        found = start_of(begun(folder))
        assert found.folder == finished
        built = SimpleNamespace(stored={})
        require_same_tokens(built, tokenizer.load(finished / "tokenizer"), found)


def test_what_params_do_not_show_is_compared(finished):
    assert start_of(begun(finished, dtype="bfloat16", remat="full"))
    with pytest.raises(ValueError, match=r"heads=4 \(there 2\)"):
        start_of(begun(finished, heads=4))
    with pytest.raises(ValueError, match="rope_theta"):
        start_of(begun(finished, rope_theta=123.0))


def test_more_steps_than_a_run_began_with_make_another_run(finished):
    """Whether it is finished or not; what is said can be done."""
    c = get_config()
    c.workdir = str(finished)
    with claim(check(c)):
        pass
    c.steps = 40
    told = (
        r"steps: 20 there, 40 here\nA run's learning rate .* --config.init.checkpoint="
        rf"{re.escape(str(finished))} \(and --config.seed=1, or"
    )
    with pytest.raises(ValueError, match=told), claim(check(c)):
        pass
    c.seed, c.workdir = 1, str(finished.parent / "longer")
    c.init.checkpoint = str(finished)
    with claim(run := check(c)):
        assert start_of(run).folder == finished
    c.workdir, c.steps = str(finished), 20
    with pytest.raises(ValueError, match=r"seed: 0 there, 1 here\nchoose another"), claim(check(c)):
        pass


def test_another_tokenizer_is_refused(finished, tmp_path):
    texts = ["some text to make a vocabulary from, some more text, some text again"] * 3
    (tmp_path / "other").mkdir()
    tokenizer.train_bpe(texts, 270, tmp_path / "other")
    found = start_of(begun(finished))
    built, ours = SimpleNamespace(stored={}), tokenizer.load(tmp_path / "other")
    with pytest.raises(ValueError, match=r"the start of this run, .* another tokenizer"):
        require_same_tokens(built, ours, found)
    converted_without = found._replace(tokenizer=tmp_path / "none")  # nothing to compare with
    require_same_tokens(built, ours, converted_without)


def test_a_folder_that_is_not_there_is_called_so(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXLM_TEST_TEXT", str(tmp_path))
    with pytest.raises(ValueError, match=r"config.init.checkpoint=.*no such folder"):
        start_of(begun(tmp_path / "runs" / "sft"))


def test_what_would_happen_too_late_is_refused():
    c = get_config()
    c.method = "next_token + ema"
    c.ema.every = c.steps
    with pytest.raises(ValueError, match="change nothing"):
        check(c)

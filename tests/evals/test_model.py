"""What an evaluation asks is the same in all processes, or nothing is computed."""

import contextlib
from types import SimpleNamespace

import jax
import pytest

from jaxlm import openflags, tasks
from jaxlm.data import tokenizer as tokenizers
from jaxlm.evals import model as models
from jaxlm.evaluate import __main__ as evaluate
from jaxlm.host import cluster

pytest.importorskip("transformers")


@pytest.fixture
def opened(tmp_path, monkeypatch):
    tokenizers.save_byte(tmp_path)
    (tmp_path / "run.json").touch()
    for name in ("Scorer", "Generator"):
        monkeypatch.setattr(models, name, lambda *_, **__: lambda *_, **__: [])
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    return SimpleNamespace(
        lm=None, params={}, folder=tmp_path, mesh=mesh, length=64, ends=frozenset({257})
    )


def for_a_command(opened, monkeypatch):
    monkeypatch.setattr(openflags, "opened", lambda *_, **__: opened)
    flags = SimpleNamespace(checkpoint=str(opened.folder), bos="auto", batch_tokens=0)
    console = SimpleNamespace(phase=lambda *_: contextlib.nullcontext(), warn=print)
    return evaluate._opened(flags, console)[0]


def for_a_run(opened, monkeypatch):
    monkeypatch.setattr(tasks, "loaded", lambda spec: None)
    run = SimpleNamespace(eval=SimpleNamespace(tasks_limit=0), data=SimpleNamespace(length=64))
    built = SimpleNamespace(run=run, scorer=None, mesh=opened.mesh)
    return tasks.RunningTasks(built, opened.folder, opened.ends, print)._model


@pytest.mark.parametrize("made", [for_a_command, for_a_run])
def test_requests_are_compared_before_any_is_computed(opened, monkeypatch, made):
    model = made(opened, monkeypatch)
    assert model.score([1]) == []

    def differ(what, value):
        raise ValueError(f"{what}: {value}")

    monkeypatch.setattr(cluster, "agree", differ)
    for ask in (model.score, model.generate):
        with pytest.raises(ValueError, match=r"what the model is asked: \[7\]"):
            ask([7])

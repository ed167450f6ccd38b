"""Training that starts from a Hugging Face folder, and a run of ours as a Hugging Face folder."""

import json
import pathlib
import shutil
import subprocess
import sys

import pytest
import whole_runs
from cases import CASES, save
from fake import shapes_of

from jaxlm import folder
from jaxlm.build import build
from jaxlm.config import check, defaults, differences, from_saved, nest, source
from jaxlm.convert import to_hf
from jaxlm.data import tokenizer as tokenizers
from jaxlm.hf import kept

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "llama"
    config = CASES["llama 3.1"] | {"vocab_size": 264}
    save(path, config, shapes_of(config))
    tokenizers.save_byte(path)
    return path


@pytest.fixture
def recipe(llama):
    c = defaults()
    c.data.mix.code = source(source="stdlib-code", weight=1.0)
    c.init.hf = str(llama)
    return c


def test_the_model_and_its_tokenizer_are_those_of_the_folder(recipe, llama):
    recipe.model.param_dtype = "bfloat16"  # how a model is run stays the recipe's
    run = check(recipe)
    assert (run.model.width, run.model.kv_heads, run.model.vocabulary) == (32, 2, 264)
    assert run.model.rope_scaling.startswith("llama3 factor=8 ")
    assert run.model.param_dtype == "bfloat16"
    assert run.data.tokenizer == str(llama)
    assert run.config["model.width"] == 32
    again = from_saved(json.loads(json.dumps(run.config)))  # the folder may be gone by then
    assert again.model == run.model
    assert again.init.hf == ""


def test_a_run_that_has_begun_does_not_need_the_folder(recipe, tmp_path):
    gone = tmp_path / "gone"
    shutil.copytree(recipe.init.hf, gone)
    recipe.init.hf, recipe.workdir = str(gone), str(tmp_path / "run")
    began = check(recipe)
    (tmp_path / "run").mkdir()
    tokenizers.copy(gone, tmp_path / "run" / "tokenizer")
    kept.write(tmp_path / "run", kept.of_hf(gone, began.model))
    tokens = tokenizers.load(gone).hash
    shutil.rmtree(gone)
    with pytest.raises(ValueError, match="gone"):
        check(recipe)  # it has not begun yet
    folder.write(tmp_path / "run" / "run.json", {"config": nest(began.config)})
    again = check(recipe)
    assert again.model == began.model
    assert differences(began.config, again.config) == []
    assert tokenizers.load(pathlib.Path(again.data.tokenizer)).hash == tokens
    build(again, 258)
    recipe.model.layers = 3
    with pytest.raises(ValueError, match=r"layers=3 \(there 2\)"):
        check(recipe)


def test_a_recipe_gives_way_to_a_folder_of_the_command_line(recipe, llama):
    recipe.model.update(qk_norm=True, loss_chunk=64)
    recipe.data.tokenizer = "byte"
    run = check(recipe, ("init.hf",))
    assert (run.model.qk_norm, run.model.loss_chunk) == (False, 64)
    assert run.data.tokenizer == str(llama)
    assert run.notes == (
        "config.model.qk_norm=False: config.init.hf has it so, and the recipe's is True",
        f"config.data.tokenizer={str(llama)!r}: config.init.hf has it so, and the recipe's is "
        "'byte'",
    )
    assert check(recipe, ("init.hf", "data.tokenizer")).data.tokenizer == "byte"
    with pytest.raises(ValueError, match=r"qk_norm=True \(there False\); leave these keys out"):
        check(recipe, ("init.hf", "model.qk_norm"))


def test_what_contradicts_the_folder_is_named(recipe):
    recipe.model.layers = 3
    with pytest.raises(ValueError, match=r"layers=3 \(there 2\); leave these keys out"):
        check(recipe)
    recipe.model.layers = defaults().model.layers  # as good as not said
    check(recipe)
    with pytest.raises(ValueError, match=r"layers=4 \(there 2\)"):
        check(recipe, ["model.layers"])


def test_a_tokenizer_that_is_too_large_is_told_at_the_door(recipe, tmp_path):
    config = CASES["llama"]
    save(tmp_path / "small", config, shapes_of(config))
    tokenizers.copy(pathlib.Path(recipe.init.hf), tmp_path / "small")
    recipe.init.hf = str(tmp_path / "small")
    with pytest.raises(ValueError, match="they do not belong together"):
        check(recipe)


def test_a_run_starts_from_one_place(recipe):
    recipe.init.checkpoint = "runs/other"
    with pytest.raises(ValueError, match="a run starts from one of them"):
        check(recipe)


def command(tmp_path, module, *flags, code=0):
    done = subprocess.run(
        [sys.executable, "-m", f"jaxlm.{module}", *map(str, flags)],
        cwd=ROOT,
        env=whole_runs.environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_training_from_a_folder_goes_on_and_comes_back(llama, tmp_path):
    whole_runs.write_corpora(tmp_path)
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        (ROOT / "tests" / "tiny.py")
        .read_text()
        .replace("c.model.update(width=32, layers=2, heads=2)", "")
    )
    flags = [f"--config={recipe}", f"--config.workdir={tmp_path / 'run'}"]
    flags += [f"--config.init.hf={llama}", "--config.eval.samples=", "--config.steps=4"]
    command(tmp_path, "train", *flags)
    saved = json.loads((tmp_path / "run" / "run.json").read_text())
    assert saved["config"]["model"]["kv_heads"] == 2
    to_hf(tmp_path / "run", tmp_path / "back")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config == json.loads((llama / "config.json").read_text()) | {"dtype": "float32"}
    said = command(tmp_path, "convert", "to-hf", tmp_path / "run", tmp_path / "back", code=1)
    assert said.strip().endswith("choose another name, or remove it first")
    assert "Traceback" not in said

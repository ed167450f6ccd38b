import io
import math
import sys

import pytest

from jaxlm import commandline, folder, methods, summary
from jaxlm import config as configs
from jaxlm.build import build
from jaxlm.config import check, defaults, flatten, nest, source
from jaxlm.figures import best_so_far
from jaxlm.host.console import Console
from jaxlm.plan import __main__ as plan
from jaxlm.specs import CheckpointSpec
from jaxlm.start import require_figure

NUMBER_OF_KEYS = 105  # outside the groups of the methods


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    c = defaults()
    c.data.mix.a = source(source=str(tmp_path), glob="*.txt")
    return c


def test_a_typo_in_a_recipe_is_an_error():
    c = defaults()
    with pytest.raises((AttributeError, KeyError), match="learning_rate"):
        c.optimizer.learnig_rate = 3
    with pytest.raises((AttributeError, KeyError)):
        c.data.mix.x = source(wieght=1)


def test_a_whole_number_does_not_pin_a_float_knob():
    c = defaults()
    for key, value in flatten(c.to_dict()).items():
        if isinstance(value, float):
            group = c
            *groups, last = key.split(".")
            for name in groups:
                group = group[name]
            group[last] = 0.5


def test_a_reference_computed_before_training_says_how_to_let_it_follow(recipe):
    recipe.method, recipe.dpo.reference = "dpo + follow", "precomputed"
    with pytest.raises(ValueError, match=r"never move.*set config.dpo.reference='live'"):
        check(recipe)


def test_a_loss_is_told_in_bits_per_character_where_it_is_that_of_text(recipe):
    recipe.method = "next_token + lora"
    assert check(recipe).method.likelihood
    recipe.method, recipe.distill.teacher = "distill + lora", "runs/teacher"
    assert not check(recipe).method.likelihood
    assert summary.chars_per_token(check(recipe), None) is None


def test_a_finished_run_is_asked_as_it_was_at_its_end(recipe):
    assert folder.asking(check(recipe)) == '--prompt="def read"'
    recipe.data.mix.a.format = "chat"
    assert folder.asking(check(recipe)).startswith("--chat ")


def test_methods_compose_in_the_order_written(recipe):
    recipe.method = "next_token + migu"
    recipe.migu.threshold = 0.5
    run = check(recipe)
    assert run.method.objective
    assert run.method.wrap
    assert "migu.threshold" in run.config
    assert "dpo.beta" not in run.config, "only the groups in use are kept"
    assert run.changed["migu.threshold"] == [0.7, 0.5]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("steps", 0, "config.steps=0"),
        ("method", "ema", "no objective; add one, as in 'next_token . ema'"),
        ("method", "dpo + kto", "2 of the composed methods bring their own objective"),
        ("method", "dpo, lora", "several are joined by .: 'dpo . lora'"),
        ("model.learned_positions", 100, "config.data.length=128 .*learned_positions=100 at most"),
        ("method", "next_token + dpo", "objective"),
        ("expect.bits_per_char", "code:1", "code=1.30"),
        ("profile", "10 to 14", "such as '10-14', counted from 1"),
        ("profile", "0-3", "counted from 1"),
        ("profile", "14-10", "such as '10-14'"),
        ("profile", "990-1001", "config.steps=1000"),
        ("optimizer.gradient_dtype", "bfloat16", "config.accumulate=1: there is nothing to sum"),
    ],
)
def test_what_cannot_run_is_refused(recipe, key, value, message):
    recipe.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=message):
        check(recipe).expect.figures()


@pytest.mark.parametrize("accumulate", [1, 512])
def test_sums_of_gradients_may_be_said_to_be_what_they_are(recipe, accumulate):
    recipe.batch = recipe.accumulate = accumulate
    recipe.optimizer.gradient_dtype = "bfloat16"
    with pytest.raises(ValueError, match=f"for sums of 2 to 256 .*config.accumulate={accumulate}"):
        check(recipe)
    recipe.optimizer.gradient_dtype = "float32"
    assert check(recipe).optimizer.gradient_dtype == "float32"


def test_layers_are_stacked_where_moments_come_back_one_by_one(recipe):
    """Also on a GPU, for which they are not by themselves, and where a CPU stands in for one."""
    assert check(recipe).model.scan_layers == "auto"
    recipe.optimizer.offload = True
    run = check(recipe)
    assert run.model.scan_layers == "on"
    assert configs.from_saved(run.config).model == run.model
    recipe.model.scan_layers = "off"
    with pytest.raises(ValueError, match=r"offload=True.*scan_layers='off'.*leave one of them out"):
        check(recipe)


def test_a_method_of_your_own_has_knobs(recipe, monkeypatch, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from jaxlm.contract import Method\n"
        "def flood(*, level: float = 1):\n"
        "    return Method(objective=lambda *a: level)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    configs.own_method(recipe, "mine:flood")
    recipe.method = "mine:flood"
    recipe.flood.level = 0.25
    run = check(recipe)
    assert run.method.objective() == 0.25
    assert configs.from_saved(run.config).config == run.config


def test_an_empty_mixture_says_what_to_add():
    with pytest.raises(ValueError, match=r"config\.data\.add"):
        check(defaults())


def test_a_saved_config_builds_the_same_run(recipe):
    recipe.method = "next_token + ema"
    run = check(recipe)
    again = configs.from_saved(run.config)
    assert again.config == run.config
    assert again.optimizer == run.optimizer
    assert again.data == run.data
    assert flatten(nest(run.config)) == run.config


def test_the_config_says_what_the_optimizer_takes(recipe):
    run = check(recipe)
    assert (run.config["optimizer.weight_decay"], run.optimizer.b2) == (0.1, 0.95)
    assert not [key for key in run.changed if key.startswith("optimizer.")]
    recipe.optimizer.update(name="lion", weight_decay=0.1)
    run = check(recipe)
    assert (run.config["optimizer.weight_decay"], run.config["optimizer.b2"]) == (0.1, -1)
    assert run.changed["optimizer.weight_decay"] == [-1, 0.1]
    assert configs.from_saved(run.config).optimizer == run.optimizer


@pytest.mark.parametrize(("accumulate", "balance"), [(1, 0.1), (4, 0.0), (4, 0.1)])
def test_a_balance_that_accumulation_changes_is_told(recipe, accumulate, balance):
    recipe.accumulate = accumulate
    recipe.model.update(experts=4, router_balance=balance)
    notes = check(recipe).notes
    assert len(notes) == (accumulate > 1 and balance > 0)
    assert not notes or "micro-batch of 4 rows" in notes[0]


def test_only_what_the_curve_depends_on_must_stay():
    old = {"seed": 0, "mesh.fsdp": 1, "log.every": 1, "workdir": "a"}
    assert configs.differences(old, old | {"mesh.fsdp": 8, "log.every": 5, "workdir": "b"}) == []
    elsewhere = {"accumulate": 4, "model.remat": "full", "data.mix.code.source": "/other/place"}
    elsewhere |= {"model.experts_over": "fsdp"}
    assert configs.differences(old, old | elsewhere) == []
    assert configs.differences(old, old | {"seed": 1}) == ["seed: 0 there, 1 here"]
    assert configs.differences(old, old | {"model.layers": 3})


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.optimizer.lr=3", "did you mean --config.optimizer.learning_rate?"),
        ("--config.learning_rate=3", "did you mean --config.optimizer.learning_rate?"),
        ("--config.optimizer.learning_rat=3", "did you mean --config.optimizer.learning_rate?"),
        ("--config.data.mix.code.wieght=2", "did you mean --config.data.mix.code.weight?"),
        ("--config.steps=abc", "--config.steps=abc: 'abc' is no whole number"),
        ("--config.mesh.fsdp=1.5", "--config.mesh.fsdp=1.5: '1.5' is no whole number"),
        (
            "--config.flood.level=1",
            "there is no method 'flood'; register it in jaxlm/methods/__init__.py",
        ),
        ("--steps=40", "no flag --steps; keys are set like --config.steps=40"),
        ("--config.data.add=x:y", "'x:y' is no source to add: write name:path:weight"),
    ],
)
def test_a_wrong_flag_is_one_sentence(flag, message, monkeypatch):
    for words in ([flag], flag.split("=", 1)):  # the value may be a word of its own
        first = ["--config.method=flood + migu"] if "flood" in flag else words
        with pytest.raises((SystemExit, ValueError)) as error:
            parse(monkeypatch, *first, *words)
        said = str(error.value)
        assert message in said
        assert "\n" not in said
        assert "could not convert" not in said


@pytest.mark.parametrize(
    "words",
    [
        ["--config", "configs/sft.py", "--config.steps", "7", "--config.name", "a b", "--dry_run"],
        ["-config=configs/sft.py", "-config.steps=7", "--dry_run", "-config.name", "a b"],
        ["--dry_run", "--config=x.py", "--config=configs/sft.py", "--config.name=a b", "-h"],
    ],
)
def test_a_value_may_be_a_word_of_its_own(words):
    joined = commandline.joined(["train", *words])
    assert commandline.joined(joined) == joined
    assert joined[0] == "train"
    assert {"--config=configs/sft.py", "--config.name=a b", "--dry_run"} <= set(joined)
    assert commandline.value_of("config", ["train", *words]) == "configs/sft.py"
    assert commandline.value_of("topology", ["train", *words]) == ""


def test_a_recipe_may_be_a_word_of_its_own(monkeypatch):
    words = ["train", "--config", "configs/quickstart.py", "--config.steps", "7"]
    monkeypatch.setattr(sys, "argv", words)
    assert commandline.parse(sys.argv, "")[0].steps == 7
    with pytest.raises(SystemExit, match=r"there is no recipe configs/quikstart.py; did you mean"):
        commandline.parse(["train", "--config", "configs/quikstart.py"], "")


@pytest.mark.parametrize(
    "words", [["--topology=cpu:4"], ["--topology", "cpu:4"], ["-topology=cpu:4"]]
)
def test_a_plan_makes_its_devices_however_they_are_named(words, monkeypatch):
    asked = []
    monkeypatch.setattr(plan.topology, "prepare", asked.append)
    monkeypatch.setattr(sys, "argv", ["plan", *words])
    with pytest.raises(SystemExit, match="no recipe given"):
        plan.main()
    assert asked == ["cpu:4"]


def parse(monkeypatch, *given, recipe="quickstart"):
    """As from a command line: ml_collections looks for overrides in sys.argv."""
    monkeypatch.setattr(sys, "argv", ["train", f"--config=configs/{recipe}.py", *given])
    return commandline.parse(sys.argv, "")[0]


def test_what_the_command_line_promises_is_judged_and_known(monkeypatch):
    given = ("--config.steps=20", "--config.expect.others=loss/code<=2 loss/prose<=1")
    found = {"bits_per_char": {"code": 1.0}, "figures": {"loss/code": 1.5, "loss/prose": 1.5}}
    recipes, code, prose = summary.verdict(parse(monkeypatch, *given), found)
    assert "not judged" in recipes
    assert code.endswith("reached.")
    assert prose.endswith("expected: not reached.")
    for key, value in (("others", "loss/cod<=1"), ("bits_per_char", "cod=1")):
        with pytest.raises(ValueError, match=rf"config.expect.{key}=.*cod' is none of .*/code"):
            parse(monkeypatch, f"--config.expect.{key}={value}")
    given = ("--config.init.checkpoint=", "--config.data.tokenizer=byte")
    run = parse(monkeypatch, *given, "--config.expect.others=dpo/acc/pairs>=1", recipe="dpo")
    with pytest.raises(ValueError, match=r"no 'dpo/acc/pairs'; did you mean 'dpo/accuracy/pairs'"):
        require_figure(build(run, 258))


def test_a_recipe_gives_way_to_the_command_line(monkeypatch, tmp_path):
    usual = parse(monkeypatch, "--config.workdir=x")
    assert (usual.notes, usual.optimizer.adam_learning_rate) == ((), 0.012)
    adam = parse(monkeypatch, "--config.optimizer.name=adamw")
    assert adam.optimizer.adam_learning_rate == 0.0
    assert "only read by muon" in adam.notes[0]
    (tmp_path / "s1" / "tokenizer").mkdir(parents=True)
    (tmp_path / "s1" / "checkpoints" / "5").mkdir(parents=True)
    for start in ("s1", "s1/checkpoints/5"):
        given = f"--config.init.checkpoint={tmp_path / start}"
        run = parse(monkeypatch, given, "--config.steps=10", recipe="dpo")
        assert run.data.tokenizer == str(tmp_path / "s1" / "tokenizer")
        assert run.optimizer.warmup_steps == 1
        assert len(run.notes) == 2
    kept = parse(monkeypatch, given, "--config.data.tokenizer=byte", recipe="dpo")
    assert (kept.data.tokenizer, kept.notes) == ("byte", ())
    set_too = ("--config.steps=10", "--config.optimizer.warmup_steps=20")
    assert parse(monkeypatch, *set_too, recipe="dpo").optimizer.warmup_steps == 20


def test_a_recipe_promises_for_its_own_settings_only(monkeypatch):
    same = parse(monkeypatch, "--config.workdir=x", "--config.log.every=5")
    assert same.overridden == ()
    other = parse(monkeypatch, "--config.steps=20")
    assert other.overridden == ("steps",)
    found = {"bits_per_char": {"code": 3.0, "prose": 3.0}}
    assert "not judged" in summary.verdict(other, found)[0]
    assert "not reached" in summary.verdict(same, found)[0]


def test_a_promise_of_a_figure_that_is_not_there_is_said(recipe):
    recipe.expect.others = "loss/a<=0.5 los/a<=0.5"
    found = {"bits_per_char": {}, "figures": {"loss/a": 0.4}}
    first, second = summary.verdict(check(recipe), found)
    assert first.endswith("expected: reached.")
    assert second == "los/a: not given (there is loss/a); <= 0.5 expected: not reached."
    with pytest.raises(
        ValueError, match=r"config.expect.others=.* no 'los/a'; did you mean 'loss/a'"
    ):
        require_figure(build(check(recipe), 258))
    require_figure(build(check(recipe, ["steps"]), 258))  # another run than the recipe speaks of
    recipe.expect.bits_per_char = "a=1.3"
    assert "a: no bits per character were given" in summary.verdict(check(recipe), found)[-1]


def test_what_a_source_of_a_recipe_changes_is_told_from_the_defaults(recipe):
    assert "data.mix.a.glob" in check(recipe).changed
    assert "data.mix.a.weight" not in check(recipe).changed


def test_the_number_of_knobs_is_a_decision():
    known = flatten(defaults().to_dict())
    own = [k for k in known if k.split(".")[0] not in methods.METHODS]
    assert len(own) == NUMBER_OF_KEYS, "a new key is a decision: change the number in its commit"


def test_a_source_gives_what_the_method_reads(recipe):
    assert check(recipe).data.sources[0].format == "text"
    recipe.method = "dpo"
    run = check(recipe)
    assert run.data.sources[0].format == "pairs"
    assert (run.members, run.tokens_per_step) == (2, 16 * 2 * 128)
    recipe.data.mix.a.format = "chat"
    with pytest.raises(ValueError, match=r"'a' has format='chat'.*reads pairs: set .*'pairs'"):
        check(recipe)
    recipe.method = "kto"
    recipe.data.mix.a.format = ""
    assert check(recipe).data.sources[0].format == "feedback"
    recipe.method = "next_token"
    recipe.data.mix.a.format = "pairs"
    with pytest.raises(ValueError, match="'text' or 'chat', or choose another method"):
        check(recipe)


def test_the_best_checkpoint_is_told_by_a_figure_that_there_is(recipe):
    recipe.eval.every = recipe.checkpoint.every = 10
    recipe.checkpoint.keep_best = "bits_per_char/a"
    check(recipe)
    recipe.method = "dpo"
    with pytest.raises(ValueError, match="is none of loss/a"):
        check(recipe)
    recipe.method = "next_token"
    recipe.checkpoint.keep_best = "a"
    every = r"'a' is none of loss/a, bits_per_char/a; did you mean loss/a\?"
    with pytest.raises(ValueError, match=every):
        check(recipe)
    recipe.method = "dpo"
    recipe.checkpoint.keep_best = "loss/a"
    check(recipe)
    recipe.checkpoint.keep_best = "dpo/accuracy/a"
    with pytest.raises(ValueError, match="set it to 'max:dpo/accuracy/a' or 'min:dpo"):
        check(recipe)
    recipe.checkpoint.keep_best = "max:dpo/accuracy/a"
    assert check(recipe).checkpoint.best() == ("dpo/accuracy/a", "max")
    recipe.checkpoint.keep_best = "max:dpo/accuracy/b"
    with pytest.raises(ValueError, match=r"is none of loss/a, and no metric .* with /a behind it"):
        check(recipe)
    recipe.checkpoint.keep_best = "mx:loss/a"
    with pytest.raises(ValueError, match="keep_best='mx:loss/a' may begin with 'min:' or 'max:'"):
        check(recipe)


@pytest.mark.parametrize(("keep_best", "step"), [("loss/a", 20), ("min:x/a", 10), ("max:x/a", 30)])
def test_the_best_evaluation_so_far_is_named_by_its_step(keep_best, step):
    told = [(10, 2.0, 1.0), (20, 1.0, math.nan), (30, 1.0, 4.0), (40, 3.0, 4.0)]
    records = [{"step": s, "loss/a": loss, "x/a": x} for s, loss, x in told]
    spec = CheckpointSpec(keep_best=keep_best)
    assert f"by {spec.best()[0]}: step {step} (" in best_so_far(records, spec)
    assert best_so_far([], spec) == best_so_far(records, CheckpointSpec()) == ""


def test_what_to_try_next_names_the_recipe_as_it_was_given(recipe):
    recipe.name = "quickstart"
    out = io.StringIO()
    found = {"seconds": 1.0, "steps": 1, "tokens": 1, "verdict": []}
    command = "python -m jaxlm.train --config '../a clone/configs/quickstart.py' --config.steps=9"
    summary.farewell(Console(stream=out), check(recipe), found, "page", command)
    assert "jaxlm.train --config='../a clone/configs/quickstart.py' --config.w" in out.getvalue()


@pytest.mark.slow
def test_the_best_checkpoint_is_told_by_what_the_method_measures(recipe):
    recipe.method = "dpo"
    recipe.eval.every = recipe.checkpoint.every = 10
    recipe.checkpoint.keep_best = "max:dpo/acuracy/a"
    with pytest.raises(ValueError, match="did you mean 'max:dpo/accuracy/a'"):
        require_figure(build(check(recipe), 258))
    recipe.checkpoint.keep_best = "max:dpo/accuracy/a"
    require_figure(build(check(recipe), 258))


def test_a_recipe_may_promise_any_figure(recipe):
    recipe.expect.others = "dpo/accuracy/a>=0.9 loss/a<=0.5"
    run = check(recipe)
    found = {"bits_per_char": {}, "figures": {"dpo/accuracy/a": 0.95, "loss/a": 0.6}}
    first, second = summary.verdict(run, found)
    assert first == "dpo/accuracy/a: 0.950; >= 0.9 expected: reached."
    assert second.endswith("expected: not reached.")
    recipe.expect.others = "accuracy=1"
    with pytest.raises(ValueError, match="should look like"):
        check(recipe)


def test_a_run_of_before_a_key_was_there_opens(recipe):
    old = check(recipe).config
    later = ("data.template", "data.too_long", "data.mix.a.format", "data.mix.a.lift")
    assert set(later) < set(old)
    again = configs.from_saved({k: v for k, v in old.items() if k not in later})
    assert again.config == old


def test_knobs_of_a_method_that_is_not_used_are_refused(recipe):
    recipe.lora.rank = 4
    assert check(recipe), "a recipe may have them"
    with pytest.raises(ValueError, match=r"config\.lora\.rank is set, and nobody reads it"):
        check(recipe, ["lora.rank"])

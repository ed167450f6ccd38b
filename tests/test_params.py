"""Params of checkpoints of adapters: those of the model that was saved, whole, or an error."""

import jax
import numpy as np
import pytest

from jaxlm import params
from jaxlm.checkpoint import Checkpoints
from jaxlm.contract import BASE


def model(layers=2, width=4, stacked=False):
    """Params as a model has them, each number another."""
    kernel = lambda i: np.float32(i) + np.arange(6.0 * width, dtype=np.float32).reshape(width, 6)
    part = lambda x: {"up": {"kernel": x}}
    layer = {str(i): part(kernel(i)) for i in range(layers)}
    blocks = part(np.stack([kernel(i) for i in range(layers)])) if stacked else layer
    return {"embed": np.ones((3, width), np.float32), "blocks": blocks}


def shapes(*args, **kwargs):
    return jax.eval_shape(lambda: model(*args, **kwargs))


@pytest.fixture(params=["as it began", "its layers apart since", "its layers stacked since"])
def run(tmp_path, request):
    """A run of a method that is not ours: its config has no knobs of `lora`. Its base lies as the
    devices had it that the run began on, its adapter as those that it goes on on."""
    factors = lambda i: {"lora_a": np.full((4, 1), i + 1.0), "lora_b": np.ones((1, 6))}
    each = [jax.tree.map(np.float32, factors(i)) for i in range(2)]
    blocks = {str(i): {"up": one} for i, one in enumerate(each)}
    if "stacked" in request.param:
        blocks = {"up": jax.tree.map(lambda *xs: np.stack(xs), *each)}
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save_once(BASE, model(stacked="apart" in request.param))
        about = {"config": {"method": "my.own:idea"}, "adapter": {"scale": 0.5}}
        checkpoints.save(3, {"params": {"blocks": blocks}}, about)
    return tmp_path


@pytest.mark.parametrize("stacked", [False, True])
def test_the_adapter_says_its_scale(run, stacked):
    found = params.load(run, shapes(stacked=stacked))
    expected = model()
    for i in range(2):
        expected["blocks"][str(i)]["up"]["kernel"] += 0.5 * (i + 1)
    kernels = [expected["blocks"][str(i)]["up"]["kernel"] for i in range(2)]
    up = found["blocks"]["up"] if stacked else found["blocks"]["1"]["up"]
    np.testing.assert_allclose(up["kernel"], np.stack(kernels) if stacked else kernels[1])
    np.testing.assert_array_equal(found["embed"], expected["embed"])


@pytest.mark.parametrize("stacked", [False, True])
def test_params_are_kept_in_another_form_as_they_come(run, stacked):
    seen = []

    def hold(tree):
        seen.append(len(jax.tree.leaves(tree)))
        return jax.tree.map(lambda x: {"half": x / 2, "first": x[..., :1]}, tree)

    wanted = shapes(stacked=stacked)
    kept = params.Kept(hold, jax.eval_shape(hold, wanted))
    seen.clear()
    found = params.load(run, wanted, kept=kept)
    assert seen == [1, 1, 1]  # one array at a time
    expected = hold(params.load(run, wanted))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("other", [{"layers": 3}, {"layers": 1}, {"width": 8}])
def test_another_model_is_told(run, other, stacked):
    with pytest.raises(ValueError, match="was saved from another model"):
        params.load(run, shapes(**other, stacked=stacked))


def test_a_stack_with_a_layer_missing_is_none():
    found = [("embed", np.ones((3, 4))), ("blocks/0/up/kernel", np.ones((4, 6)))]
    arrays = ((path, jax.numpy.asarray(x, "float32")) for path, x in found)
    with pytest.raises(ValueError, match="1 arrays of the model are lacking, as blocks/1/up"):
        params.assembled(shapes(stacked=True), arrays)


@pytest.mark.parametrize("where", ["3", "once/base"])
def test_what_is_converted_was_verified_with_its_base(run, where):
    assert params.verified(run).name == "3"
    folder = run / "checkpoints" / where
    files = [f for f in folder.rglob("*") if f.is_file() and not f.name.startswith("digest")]
    file = max(files, key=lambda f: f.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 255
    file.write_bytes(data)
    with pytest.raises(ValueError, match=rf"{where} cannot be used: the bytes of .* have changed"):
        params.verified(run / "checkpoints" / "3")


def doubled(tree):
    return jax.tree.map(lambda x: np.float32(2) * x, tree)


@pytest.fixture(params=["as it began", "its layers apart since"])
def run_with_extras(tmp_path, request):
    """A run with an average of its params, a reference that stays, and what is neither."""
    began = model(stacked="apart" in request.param)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save_once("reference", doubled(doubled(began)))
        half = jax.tree.map(lambda x: x.astype("float16"), model())
        extras = {"ema": doubled(model()), "ema_steps": np.zeros((), np.int32)}
        checkpoints.save(3, {"params": half, "extras": extras}, {})
    return tmp_path


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize(("which", "times"), [("", 1), ("ema", 2), ("reference", 4)])
def test_an_extra_of_the_form_of_the_params_is_read_in_their_place(
    run_with_extras, which, times, stacked
):
    found = params.load(run_with_extras, shapes(stacked=stacked), which=which)
    expected = jax.tree.map(lambda x: times * x, model(stacked=stacked))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    place = params.verified(run_with_extras, which=which)
    some = {"embed": params.saved_shapes(place, which)["embed"]}
    np.testing.assert_array_equal(params.read(place, some, which)["embed"], expected["embed"])


@pytest.mark.parametrize("name", ["ema_steps", "average"])
def test_an_extra_that_is_no_such_params_is_refused_with_those_there_are(run_with_extras, name):
    with pytest.raises(
        ValueError, match=f"--params={name}: .*beside its own it has ema, reference$"
    ):
        params.load(run_with_extras, shapes(), which=name)


def test_a_run_without_extras_says_so(run):
    with pytest.raises(ValueError, match="no such params; it has its own alone"):
        params.load(run, shapes(), which=BASE)


def test_the_average_of_adapters_is_added_to_their_base(tmp_path):
    factors = {"lora_a": np.ones((4, 1), np.float32), "lora_b": np.ones((1, 6), np.float32)}
    own = {"blocks": {str(i): {"up": factors} for i in range(2)}}
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save_once(BASE, model())
        items = {"params": own, "extras": {"ema": doubled(own)}}
        checkpoints.save(3, items, {"config": {}, "adapter": {"scale": 0.5}})
    found = params.load(tmp_path, shapes(), which="ema")
    expected = model()["blocks"]["1"]["up"]["kernel"] + 0.5 * 4
    np.testing.assert_allclose(found["blocks"]["1"]["up"]["kernel"], expected)


def test_a_damaged_reference_is_noticed(run_with_extras):
    where = run_with_extras / "checkpoints" / "once" / "reference"
    files = [f for f in where.rglob("*") if f.is_file() and not f.name.startswith("digest")]
    file = max(files, key=lambda f: f.stat().st_size)
    file.write_bytes(b"\0" + file.read_bytes()[1:])
    params.load(run_with_extras, shapes(), which="ema")
    with pytest.raises(ValueError, match="reference cannot be used"):
        params.load(run_with_extras, shapes(), which="reference")

"""Generation writes what reading the whole text again for each token would, whatever the batch."""

import jax
import numpy as np
import pytest
from tiny_generator import GREEDY, generator, letters, model, plain, prompt, requests

from jaxlm import sharding
from jaxlm.generate.engine import LEAST, Generator, Request, bucket
from jaxlm.generate.sampling import Sampling

OPTIONS = {
    "plain": {},
    "scanned": {"scan_layers": "on", "qk_norm": True},
    "window": {"window": 5, "attention_soft_cap": 4.0, "logit_soft_cap": 10.0},
    "one key head": {"kv_heads": 1, "tied": False, "window": 3, "scan_layers": "on"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_greedy_is_the_likeliest_token_of_the_whole_text(name):
    options = OPTIONS[name]
    _, params = model(**options)
    asked = requests(3, 17, 9)
    found = generator(**options)(params, asked, GREEDY, logprobs=True, steps=5)
    for request, result in zip(asked, found, strict=True):
        ids, scores = plain(request.ids, request.tokens, **options)
        assert result.ids == ids
        np.testing.assert_allclose(result.logprobs, scores, atol=1e-5)
        assert result.text == letters(ids)
        assert result.finish == "length"


@pytest.mark.slow
def test_a_full_context_is_read_again_from_its_later_half():
    _, params = model()
    asked = [Request(prompt(20), 30), Request(prompt(5, 1), 30)]
    long, short = generator(context=24)(params, asked, GREEDY)
    # It reads up to 24 tokens, and writes the 25th; then 12 of them go on.
    expected, ids = [], prompt(20)
    while len(expected) < 30:
        room = 24 - len(ids) + 1
        new, _ = plain(ids, min(room, 30 - len(expected)))
        expected += new
        ids = [*ids, *new][-12:]
    assert long.ids == expected
    new, _ = plain(prompt(5, 1), 20)  # not cut with the other
    assert short.ids[:20] == new
    assert len(short.ids) == 30


@pytest.mark.slow
def test_a_penalty_knows_what_stood_before_the_context_was_read_again():
    _, params = model(layers=1)
    never_twice = Sampling(temperature=0, repetition_penalty=1e9)
    asked = [Request(prompt(9), 17)]
    (result,) = generator(context=16, layers=1)(params, asked, never_twice)
    assert len({*asked[0].ids, *result.ids}) == len({*asked[0].ids}) + 17


@pytest.mark.slow
def test_a_seed_is_a_text_whatever_the_batch_and_the_steps():
    _, params = model()
    drawn = Sampling(temperature=1.5)
    asked = [Request(prompt(7), 12, seed=seed) for seed in (3, 4, 3)]
    first, other, again = generator()(params, asked, drawn)
    assert first == again
    assert first.ids != other.ids
    assert generator()(params, [Request(prompt(7), 12, seed=4)], drawn, steps=2) == [other]
    shuffled = [*requests(14, 2, 9, 5, 6), asked[1]]
    assert generator(rows=2)(params, shuffled, drawn)[-1].ids == other.ids


@pytest.mark.slow
def test_many_draws_have_the_probabilities_of_the_model():
    lm, params = model()
    ids = prompt(6)
    asked = [Request(ids, 1, seed=seed) for seed in range(2048)]
    drawn = generator(rows=512)(params, asked, Sampling(temperature=2.0))
    counts_V = np.bincount([r.ids[0] for r in drawn], minlength=61)
    batch = {"tokens": np.array([ids]), "segments": np.ones((1, 6), int)}
    batch["positions"] = np.arange(6)[None]
    logits_V = np.asarray(lm.unembed(params, lm.hidden(params, batch)[0])[0, -1])
    probs_V = np.exp(logits_V / 2) / np.exp(logits_V / 2).sum()
    spread_V = np.sqrt(2048 * probs_V * (1 - probs_V))
    assert np.all(np.abs(counts_V - 2048 * probs_V) < 5 * spread_V + 1)


@pytest.mark.slow
def test_it_ends_at_an_end_token_and_without_it():
    _, params = model()
    whole, _ = plain(prompt(9), 12)
    end = whole[5]
    ending = whole.index(end)
    (result,) = generator(ends=(end,))(params, [Request(prompt(9), 12)], GREEDY, logprobs=True)
    assert result.ids == whole[:ending]
    assert len(result.logprobs) == ending
    assert result.finish == "stop"


@pytest.mark.slow
def test_it_ends_before_a_stop_string_that_several_tokens_make():
    _, params = model()
    whole, _ = plain(prompt(9), 12)
    stop = letters(whole[4:7])
    at = letters(whole).index(stop)
    told = []
    asked = [Request(prompt(9), 12, stops=("never", stop))]
    (result,) = generator()(
        params, asked, GREEDY, steps=2, on_text=lambda _, text: told.append(text)
    )
    assert result.text == letters(whole)[:at]
    assert result.ids == whole[: at + 3]
    assert result.finish == "stop"
    assert "".join(told) == result.text


@pytest.mark.slow
def test_compiling_ahead_runs_nothing_and_leaves_nothing_to_compile(tmp_path):
    """Several processes compile before they meet: only then may a program run."""
    from jax.experimental.compilation_cache import compilation_cache

    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    compilation_cache.reset_cache()
    try:
        own = Generator(model(layers=1)[0], 64, letters, ())
        params, asked = model(layers=1)[1], requests(20, 24)
        own.compile(params, asked, GREEDY)
        assert own.programs.read._cache_size() == own.programs.write._cache_size() == 0
        programs = lambda: {
            p.name for p in tmp_path.glob("jit__*cache") if "read" in p.name or "write" in p.name
        }
        made = programs()
        assert len(made) == 2
        own(params, asked, GREEDY)
        assert programs() == made
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()


@pytest.mark.slow
def test_one_compilation_for_each_shape():
    lm, params = model()
    traced = []
    count = lambda name, fn: lambda *args: traced.append(name) or fn(*args)
    counted = lm._replace(begin=count("begin", lm.begin), extend=count("extend", lm.extend))
    generate = Generator(counted, 64, letters, ())
    for length in (3, 9, LEAST):
        generate(params, requests(length, tokens=20 - length % 3), GREEDY)
    assert traced == ["begin", "extend"]  # as long as it may get
    generate(params, requests(LEAST + 1, tokens=20), GREEDY)
    assert traced == ["begin", "extend", "begin"]  # a longer prompt, as many slots
    generate(params, requests(LEAST + 1, tokens=40), GREEDY)
    assert len(traced) == 5


def test_buckets_hold_what_they_are_for():
    sizes = sorted({bucket(n) for n in range(1, 5000)})
    assert sizes[:6] == [16, 24, 32, 48, 64, 96]
    assert all(n <= bucket(n) <= max(LEAST, 1.5 * n) for n in range(1, 5000))
    rows = [bucket(n, least=1) for n in range(1, 33)]
    assert sorted(set(rows)) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32]
    assert all(n <= padded <= 1.5 * n for n, padded in enumerate(rows, 1))


@pytest.mark.slow
def test_eight_devices_write_the_text_of_one():
    options = {"scan_layers": "on", "vocabulary": 64}
    lm, params = model(**options)
    asked = requests(3, 17, 9, 30, 5, tokens=8)
    drawn = Sampling(temperature=0.7, top_p=0.9, repetition_penalty=1.2)
    alone = Generator(lm, 64, letters, ())(params, asked, drawn, logprobs=True)
    mesh = sharding.make_mesh(sharding.MeshSpec(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        spread = jax.device_put(params, sharding.param_shardings(lm.axes, params, mesh))
        generate = Generator(lm, 64, letters, ())
        found = generate(spread, asked, drawn, logprobs=True)
        rows = generate._rows([], [], 16)  # an empty batch still lies on the mesh
        state, _ = generate.programs.read(
            spread, rows, drawn.numbers, np.array([-1]), length=24, kind=drawn.kind, scored=False
        )
        memory = jax.tree.leaves(state.cache.blocks)[0]
    assert [r.ids for r in found] == [r.ids for r in alone]
    for one, other in zip(found, alone, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)
    here = memory.addressable_shards[0].data.shape
    assert np.prod(memory.shape) == 8 * np.prod(here)  # rows over four devices, heads over two


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request([], 3), "prompt 1 is empty"),
        (Request([1] * 65, 3), "65 tokens, more than the model's context of 64"),
        (Request([1], 0), "asks for 0 tokens"),
    ],
)
def test_what_cannot_be_continued_is_refused(request_, words):
    with pytest.raises(ValueError, match=words):
        generator()(model()[1], [request_], GREEDY)

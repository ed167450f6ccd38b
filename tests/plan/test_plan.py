"""Plans against what is known by hand, against the compiler, and against a run."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import pytest
import tiny
from jax.experimental import topologies

from jaxlm import sharding
from jaxlm.build import build
from jaxlm.chips import CHIPS
from jaxlm.config import check, flatten
from jaxlm.host import gpu_memory, process
from jaxlm.plan import (
    gpus,
    hlo,
    knobs,
    make,
    memory,
    reckon,
    roofline,
    scaling,
    sweep,
    tell,
    topology,
)
from jaxlm.plan.collectives import Collective, by_kind_and_axes
from jaxlm.plan.program import Compiled, compile_step
from jaxlm.plan.traffic import Traffic, traffic

MEASURE = pathlib.Path(__file__).with_name("measure.py")


def run(batch=8, **model):
    c = tiny.get_config()
    c.batch = batch
    c.model.update(vocabulary=256, **model)
    return check(c)


@pytest.fixture(scope="module")
def here():
    chip = topology.CHIPS["v5e"]._replace(name="cpu", platform="cpu", torus=0, joined=0)
    return topology.Topology("cpu:8", chip, jax.devices(), ())


def test_the_state_by_kind():
    """Sharded over all eight but for the norms; Adam holds two moments of each parameter."""
    built = build(run(), 256, jax.devices())
    held = memory.reckon(built)
    scales = 4 * (2 * 2 * 32 + 32)
    kernels = 4 * sum(reckon.parameters(built.run))
    assert held.parameters == held.gradients == kernels / 8 + scales
    assert held.optimizer == pytest.approx(2 * held.parameters, abs=16)  # and two counts
    assert held.extras == 0
    assert held.total > held.state
    followed = check(_with_reference())
    built = build(followed, 256, jax.devices())
    assert memory.reckon(built).extras == held.parameters + 4  # and a count


def test_the_state_in_other_dtypes_and_on_the_host():
    recipe = run()
    held = memory.reckon(build(recipe, 256, jax.devices()))
    kernels = 4 * sum(reckon.parameters(recipe)) / 8
    half = make.changed(recipe, optimizer__second_moment_dtype="bfloat16", accumulate=1)
    found = memory.reckon(build(half, 256, jax.devices()))
    assert held.optimizer - found.optimizer == pytest.approx(held.parameters / 2, abs=8)
    away = make.changed(recipe, optimizer__offload=True, model__scan_layers="on")
    found = memory.reckon(build(away, 256, jax.devices()))
    assert found.host == pytest.approx(2 * kernels)  # scales stay, and two counts
    assert found.optimizer == held.optimizer - found.host
    assert held.total - found.total == found.host
    sums = [
        memory.reckon(build(make.changed(run(16), accumulate=2, **more), 256, jax.devices()))
        for more in ({}, {"optimizer__gradient_dtype": "bfloat16"})
    ]
    assert sums[0].gradients - sums[1].gradients == pytest.approx(kernels / 2, rel=0.02)


def _with_reference():
    c = tiny.get_config()
    c.model.vocabulary = 256
    c.method = "next_token + ema"
    return c


def test_stored_activations_by_hand():
    """With full remat a block stores what it reads; and more rows store more."""
    model, rows, length = memory.share_of_one(
        run(remat="full"), {"tensor": 1, "data": 1, "fsdp": 8, "sequence": 1}
    )
    assert (rows, length) == (1, 32)
    kept = memory.stored(model, rows, length, True)
    stream = 4 * rows * length * 32
    assert 2 * stream <= kept <= 6 * stream  # two blocks, the ends, masks and angles
    more = dataclasses.replace(model, remat="none")
    assert memory.stored(more, rows, length, True) > 3 * kept
    assert memory.stored(model, 4 * rows, length, True) == pytest.approx(4 * kept, rel=0.01)
    assert memory.stored(more, rows, length, False) > memory.stored(more, rows, length, True)


@pytest.mark.slow
def test_a_plan_agrees_with_the_compiler(here):
    """Arguments to the byte, FLOPs within a tenth, all memory within a factor of two."""
    recipe = run(width=64, layers=3, ffn_width=256, scan_layers="off")
    made = make.plan(recipe, here)
    whole = ("step", "guard")
    rest = sum(
        x.size * x.dtype.itemsize
        for k in whole
        for x in jax.tree.leaves(getattr(made.built.abstract, k))
    )
    batch = memory.on_one_device(made.built.abstract_batch())
    sent = made.memory.state + rest + batch + 8  # the key
    unread = memory.on_one_device(
        {k: v for k, v in made.built.abstract_batch().items() if k in ("source", "index")}
    )
    assert made.compiled.arguments in (sent, sent - unread, sent - unread - 8)
    compiled = made.built.trace().lower().compile()
    flops = compiled.cost_analysis()["flops"] * 8
    assert made.computed_flops == pytest.approx(flops, rel=0.1)
    assert made.compiled.peak / 2 < made.memory.total < 2 * made.compiled.peak
    assert made.fits
    assert made.times.step > 0
    scattered = by_kind_and_axes(made.compiled.collectives)
    by_hand = reckon.sent(recipe, dict(made.built.mesh.shape))
    assert sum(scattered.values()) == pytest.approx(by_hand.fsdp, rel=0.6)


@pytest.mark.slow
def test_memory_of_a_run_is_what_was_planned():
    """The peak of resident memory while a step runs, next to the plan's, within a tenth."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("this system does not reset a process's peak of memory")
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment["JAX_PLATFORMS"] = "cpu"
    done = subprocess.run(
        [sys.executable, MEASURE], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["planned"] == pytest.approx(found["measured"], rel=0.1), found


def helpful(here, c):
    """What is told to save memory of a recipe's run, and the memory of that."""
    built = build(check(c), 256, jax.devices())
    before = memory.reckon(built)
    plan = types.SimpleNamespace(built=built, memory=before, topology=here, capacity=before.total)
    return knobs.helpful(plan), before


@pytest.mark.slow
def test_knobs_save_what_they_say(here):
    """Given on the command line they make the run that was reckoned; savings known by hand."""
    c = tiny.get_config()
    c.batch, c.model.vocabulary, c.model.scan_layers = 16, 4096, "off"
    found, before = helpful(here, c)
    assert [k.saves for k in found] == sorted((k.saves for k in found), reverse=True)
    for knob in found:
        other = c.copy_and_resolve_references()
        for flag in knob.flag.split():
            key, value = flag.removeprefix("--config.").split("=")
            kind = type(flatten(c.to_dict())[key])
            value = value == "True" if kind is bool else kind(value)
            other.update_from_flattened_dict({key: value})
        built = build(check(other), 256, jax.devices())
        assert before.total - memory.reckon(built).total == knob.saves, knob.flag
    saves = {k.flag: k.saves for k in found}
    tokens, vocabulary = 16 // 8 * 32, 4096  # of a device
    logits = 1.5 * 4 * (tokens - tokens // 4) * vocabulary  # and half of them for gradients
    assert saves[f"--config.model.loss_chunk={tokens // 4}"] == logits
    kernels = sum(reckon.parameters(check(c))) / 8
    assert saves["--config.optimizer.moment_dtype=bfloat16"] == pytest.approx(2 * kernels, rel=0.02)
    offload = "--config.optimizer.offload=True --config.model.scan_layers=on"
    assert saves[offload] == pytest.approx(8 * kernels, rel=0.02)


OFFLOAD = {"optimizer__offload": True, "model__scan_layers": "on"}
HALF = {"optimizer__moment_dtype": "bfloat16", "optimizer__second_moment_dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("keys", "bytes"),
    [
        ({}, 4 + 4 + 8),
        (HALF, 4 + 4 + 4),
        (OFFLOAD, 4 + 4),
        ({"model__param_dtype": "bfloat16"}, 2 + 2 + 8),
        ({"accumulate": 4}, 4 + 4 + 4 + 8),
    ],
)
def test_weak_scaling_holds_what_the_run_holds(keys, bytes):
    """Of each number: parameter, gradient, the sum of them over micro-batches, two moments."""
    recipe = make.changed(run(batch=4), **keys)
    one = dict.fromkeys(sharding.MESH_AXES, 1)
    built = build(recipe, 256, jax.devices()[:1])
    whole = memory.reckon(built, True)
    held = lambda sizes: scaling.held(recipe, whole, sizes)
    passes = memory.passes(*memory.share_of_one(recipe, one), 1, True)
    numbers = sum(reckon.parameters(recipe))
    assert held(one) - passes == pytest.approx(bytes * numbers, rel=0.02)  # scales and counts
    assert held(one) == memory.reckon(built, True).total


@pytest.mark.slow
def test_key_heads_may_be_fewer_than_the_devices_that_share_heads():
    recipe = run(batch=8, heads=4, kv_heads=2)
    sizes = dict.fromkeys(sharding.MESH_AXES, 1) | {"tensor": 4}
    model, *_ = memory.share_of_one(recipe, sizes)
    assert (model.heads, model.kv_heads) == (1, 1)
    found = scaling.weak_scaling(recipe, CHIPS["h100"])
    assert {p.sizes["tensor"] for p in found} <= {1, 2}


def test_weak_scaling_asks_for_no_mesh_and_no_machine(monkeypatch):
    """A recipe's mesh is of its own machine; the way to the host's memory takes its time."""
    monkeypatch.setattr(make, "step_flops", lambda *_: (1, 1.0))
    mesh = {"mesh__tensor": 2, "mesh__sequence": 2, "mesh__data": 2}
    recipe = make.changed(run(batch=8, heads=4), **mesh)
    chip = CHIPS["v5e"]
    plain, away = (
        scaling.weak_scaling(make.changed(recipe, **keys), chip) for keys in ({}, OFFLOAD)
    )
    assert [p.devices for p in plain] == list(scaling.DEVICES)
    assert all(p.times.host == 0 for p in plain)
    kernels = sum(reckon.parameters(recipe))
    for p in away:
        moments = 8 * kernels / p.sizes["fsdp"]
        assert p.times.host == pytest.approx(2 * moments / (0.9 * chip.host))


@pytest.mark.slow
def test_sweep_ranks_by_time_what_fits(here):
    recipe = run(batch=8, remat="none", heads=4, kv_heads=2, layers=1)
    found = sweep.rank(recipe, here)
    steps = [choice.times.step for choice in found]
    assert steps == pytest.approx(sorted(steps), rel=0.01)
    assert {choice.sizes["tensor"] for choice in found} == {1, 2}
    assert {choice.run.model.remat for choice in found} == set(sweep.REMATS)
    least = min(choice.bytes for choice in found)
    tight = here._replace(chip=here.chip._replace(memory_bytes=least * 1.2))
    kept = sweep.rank(recipe, tight)
    assert kept
    assert len(kept) < len(found)
    assert all(choice.bytes < 0.9 * 1.2 * least for choice in kept)
    assert not sweep.rank(recipe, here._replace(chip=here.chip._replace(memory_bytes=least / 2)))


def test_sweep_leaves_out_meshes_that_do_not_divide_the_experts(here):
    keys = {"heads": 4, "kv_heads": 2, "experts": 4}
    tensor = lambda **more: [m["mesh__tensor"] for m in sweep.meshes(run(**keys, **more), here)]
    assert tensor() == tensor(experts_over="tensor") == [1, 2]
    assert tensor(experts_over="fsdp") == [2]


def test_traffic_by_hand():
    """Of a stack that a loop slices each slice counts once, and so does what it updates."""
    x = jax.numpy.ones((16, 128, 128))

    def scaled(x):
        return jax.lax.scan(lambda c, row: (c, row * 2), None, x)[1]

    program = hlo.parse(jax.jit(scaled).lower(x).compile().as_text())
    moved = traffic(program)
    assert moved.with_products == 0
    # Read once and written once; a CPU also clears what it will write.
    assert 2 * x.nbytes <= moved.without <= 3.1 * x.nbytes
    product = hlo.parse(jax.jit(lambda x: x[0] @ x[1]).lower(x).compile().as_text())
    assert traffic(product).with_products >= 3 * 128 * 128 * 4


CUBLAS = """
ENTRY %main (x: bf16[4,8], w: bf16[8,2]) -> bf16[4,2] {
  %x = bf16[4,8]{1,0} parameter(0)
  %w = bf16[8,2]{1,0} parameter(1)
  %gemm = (bf16[4,2]{1,0}, s8[33554432]{0}) custom-call(%x, %w), custom_call_target="__cublas$gemm"
  ROOT %y = bf16[4,2]{1,0} get-tuple-element(%gemm), index=0
}
"""


NESTED = """
%inner (s: f32[80,4,4], i: s32[]) -> f32[4,4] {
  %s = f32[80,4,4]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = f32[1,4,4]{2,1,0} dynamic-slice(%s, %i, %zero, %zero), dynamic_slice_sizes={1,4,4}
  ROOT %b = f32[4,4]{1,0} bitcast(%slice)
}

%outer (t: f32[80,4,4], j: s32[], w: f32[4,4]) -> f32[4,4] {
  %t = f32[80,4,4]{2,1,0} parameter(0)
  %j = s32[] parameter(1)
  %w = f32[4,4]{1,0} parameter(2)
  %x = f32[4,4]{1,0} fusion(%t, %j), kind=kLoop, calls=%inner
  ROOT %y = f32[4,4]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (t: f32[80,4,4], j: s32[], w: f32[4,4]) -> f32[4,4] {
  %t = f32[80,4,4]{2,1,0} parameter(0)
  %j = s32[] parameter(1)
  %w = f32[4,4]{1,0} parameter(2)
  %start = (f32[4,4]{1,0:S(1)}, f32[4,4]{1,0}, u32[]) copy-start(%w)
  %near = f32[4,4]{1,0:S(1)} copy-done(%start)
  ROOT %z = f32[4,4]{1,0} fusion(%t, %j, %near), kind=kOutput, calls=%outer
}
"""


def test_what_a_fusion_in_a_fusion_slices_is_not_read_whole():
    """One layer of 80 is read and one result written; the weights come by a copy to the chip."""
    one = 4 * 4 * 4
    assert traffic(hlo.parse(NESTED)) == Traffic(one + 4 + one, one)


def test_a_product_by_cublas_is_one_and_its_workspace_is_no_traffic():
    assert traffic(hlo.parse(CUBLAS)) == Traffic(2 * (32 + 16 + 8), 0)


def device(i, coords=(0, 0), slice_index=0):
    return types.SimpleNamespace(id=i, coords=coords, slice_index=slice_index)


def test_times_by_hand():
    v5e = topology.Topology("v5e:16x16", CHIPS["v5e"], [], (16, 16))
    row = [device(i, (i, 0)) for i in range(16)]
    square = [device(i, divmod(i, 16)) for i in range(256)]
    assert roofline.bandwidth(v5e, row) == (100e9, False)  # two of four links
    assert roofline.bandwidth(v5e, square) == (200e9, False)
    assert roofline.bandwidth(v5e, [device(0), device(1, slice_index=1)]) == (3.125e9, True)
    small = v5e._replace(grid=(4, 4))  # no ring
    assert roofline.bandwidth(small, square) == (100e9, False)
    half = [device(i, (i // 16, i % 16)) for i in range(128)]  # a ring along one side only
    assert roofline.bandwidth(v5e, half) == (150e9, False)
    node = topology.Topology("h100:16", CHIPS["h100"], [], ())
    assert roofline.bandwidth(node, [device(i) for i in range(8)]) == (450e9, False)
    assert roofline.bandwidth(node, [device(i) for i in range(16)]) == (50e9, True)
    sent = [Collective("all-gather", ("fsdp",), tuple(range(256)), 18e9, 10.0)]
    times = roofline.times(v5e, square, 197e12, Traffic(0.0, 819e9 * 0.9), sent)
    assert times == pytest.approx((1.0, 1.0, 1.0, 0.0, 0.0))
    assert (times.step, times.nothing_hidden) == pytest.approx((2.0, 3.0))
    moments = 0.9 * CHIPS["v5e"].host / 2  # as many bytes come and go in a second
    times = roofline.times(v5e, square, 197e12, Traffic(0.0, 819e9 * 0.9), sent, moments)
    assert times == pytest.approx((1.0, 1.0, 1.0, 0.0, 1.0))
    assert (times.step, times.nothing_hidden) == pytest.approx((3.0, 4.0))


@pytest.mark.parametrize(
    ("name", "slices", "said"),
    [
        ("v5e16x16", 1, "did you mean v5e:16x16"),
        ("h100", 1, "did you mean h100:8"),
        ("h100:none", 1, "there is no topology"),
        ("h100:8", 2, "--slices=2 is for TPU slices"),
        ("gpu", 1, "JAX finds no GPU here"),
        ("cpu:9", 1, "only 8 CPU devices"),
    ],
)
def test_wrong_topologies_are_told_in_a_sentence(name, slices, said):
    with pytest.raises(ValueError, match=said):
        topology.resolve(name, slices)


def present(kind, **stats):
    device = types.SimpleNamespace(device_kind=kind, platform="gpu", memory_stats=lambda: stats)
    return lambda *_: [device] * 2


def test_memory_is_what_jax_may_take(monkeypatch):
    """Of a GPU elsewhere the share that our commands ask for; of one that is here, what it says."""
    for name in (gpu_memory.VARIABLE, gpu_memory.OLD):
        monkeypatch.delenv(name, raising=False)
    elsewhere = topology.Topology("h100:8", CHIPS["h100"], [], ())
    assert elsewhere.capacity == pytest.approx(0.94 * 84e9)
    monkeypatch.setenv(gpu_memory.VARIABLE, ".5")
    assert elsewhere.capacity == 42e9
    assert topology.Topology("v5e:4x4", CHIPS["v5e"], [], (4, 4)).capacity == 2**34
    monkeypatch.setattr(jax, "devices", present("NVIDIA H100 80GB HBM3", bytes_limit=7e10))
    assert topology.resolve("gpu").capacity == 7e10
    monkeypatch.setattr(jax, "devices", present("NVIDIA H100 80GB HBM3"))
    assert topology.resolve("gpu").capacity == 42e9


def test_a_slice_of_a_gpu_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(jax, "devices", present("NVIDIA H100 80GB HBM3 MIG 1g.10gb"))
    with pytest.raises(ValueError, match=r"MIG 1g.10gb is a slice of a GPU.*h100:8"):
        topology.resolve("gpu")


@pytest.mark.parametrize(
    ("measured", "said"), [(0.0, r"JAX takes 94% of a GPU"), (5e9, "tells it")]
)
def test_a_plan_says_whose_memory_it_holds_the_program_against(monkeypatch, here, measured, said):
    for name in (gpu_memory.VARIABLE, gpu_memory.OLD):
        monkeypatch.delenv(name, raising=False)
    built = build(run(), 256, jax.devices())
    node = here._replace(chip=CHIPS["h100"], measured=measured, compiled_for_it=False)
    empty = Compiled(0.0, hlo.parse(CUBLAS), [])
    made = make.Plan(built, node, empty, memory.reckon(built), 1, 1.0, None)
    assert made.capacity == (measured or 0.94 * 84e9)
    lines = []
    tell.memory_of(types.SimpleNamespace(say=lines.append, table=lambda *_: None), made)
    assert said in lines[-1]


PEAKS = {  # what a compiler tells, to what is reckoned of the run
    "refused": (1.5, Compiled(0.0, None, [])),
    "refused, for less than is reckoned": (0.8, Compiled(0.0, None, [])),
    "a stand-in": (1.0, Compiled(0.0, hlo.parse(CUBLAS), [], 1e9)),
    "compiled": (3.0, Compiled(0.0, hlo.parse(CUBLAS), [], code=1e3)),
    "compiled, for less than the state": (0.1, Compiled(0.0, hlo.parse(CUBLAS), [])),
}


@pytest.mark.parametrize("case", PEAKS)
def test_what_is_told_of_memory_adds_up(monkeypatch, here, case):
    """Rows to the total, in a unit in which they are not zero; nothing saves more than there is."""
    times, compiled = PEAKS[case]
    built = build(run(), 256, jax.devices())
    held = memory.reckon(built)
    peak = times * held.total
    refused = {"needs": peak, "has": 15.75 * 2**30} if "refused" in case else {}
    compiled = compiled._replace(**(refused or {"temporaries": peak - compiled.code}))
    device = here._replace(compiled_for_it=case != "a stand-in")
    made = make.Plan(built, device, compiled, held, 1, 1.0, None)
    rows = tell.rows_of_memory(made)
    assert made.peak_bytes == pytest.approx(peak)
    assert sum(size for _, size, _ in rows) == pytest.approx(peak)
    assert all(size >= 0 for _, size, _ in rows)
    given = [knobs.Knob("--config.some=1", 0.95 * held.total, "little")]
    monkeypatch.setattr(knobs, "helpful", lambda plan: given)
    said, tables = [], []
    console = types.SimpleNamespace(say=said.append, table=tables.append)
    tell.memory_of(console, made)
    tell.what_helps(console, made)
    unit, size = {True: ("MiB", 2**20), False: ("KiB", 2**10)}[peak >= 2**19]
    assert said[0] == f"\nMemory of one device, {unit}"
    assert all(float(row[1].replace(",", "")) > 0 for row in tables[0] if row[0] != "program")
    saves, of = tables[1][0][1].split()
    assert of == unit
    assert float(saves) == pytest.approx(0.95 * min(peak, held.total) / size, abs=0.006)
    assert ("less what the compiler keeps back" in said[2]) == ("refused" in case)
    capacity = made.capacity / 2**30
    assert f" {unit} of {capacity:.2f} GiB, " in said[1]


@pytest.mark.parametrize(
    ("tokens", "seconds", "words"),
    [
        (2.355e6, 1e-4, "2.4M tokens take 0.9 s"),
        (1e12, 0.25, "1.0T tokens take 11302 d 19 h"),
        (1e15, 1e-6, "22.1T tokens a day"),
    ],
)
def test_tokens_and_times_are_told_by_their_size(here, tokens, seconds, words):
    said = []
    console = types.SimpleNamespace(say=said.append, table=lambda *_: None)
    told = types.SimpleNamespace(
        times=roofline.Times(seconds, 0.0, 0.0, 0.0), topology=here, tokens=256, mfu=lambda _: 0.5
    )
    tell.times(console, told, tokens)
    assert words in said[1]


def test_of_meshes_equal_in_time_the_one_with_less_memory_comes_first():
    def choice(held, seconds, accumulate=1, tensor=1):
        times = roofline.Times(seconds, 0.0, 0.0, 0.0)
        run = types.SimpleNamespace(accumulate=accumulate)
        return sweep.Choice(run, {"tensor": tensor}, held, times)

    order = [choice(5.0, 1.0001, 1, 2), choice(9.0, 1.0), choice(1.0, 1.0, 2), choice(0.5, 2.0)]
    mixed = [order[i] for i in (3, 1, 2, 0)]
    assert sorted(mixed, key=sweep._order) == order


def test_without_the_compiler_of_a_tpu_the_remedy_is_told(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'pip install "jax\[tpu\]=='):
        topology.resolve("v5e:4x4")


@pytest.mark.parametrize(
    "said",
    [
        "in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.",
        "on HBM, the total memory required for HLO temporaries (20.50G) exceeds available HBM "
        "(15.75G).",
    ],
)
def test_running_out_of_memory_is_an_answer(here, monkeypatch, said):
    class Lowered:
        def compile(self, options):
            raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: Ran out of memory {said}")

    built = build(run(), 256, jax.devices())
    monkeypatch.setattr(type(built), "trace", lambda self: types.SimpleNamespace(lower=Lowered))
    compiled = compile_step(built, here)
    assert (compiled.program, compiled.peak / 2**30, compiled.has / 2**30) == (None, 20.5, 15.75)


def test_parameters_left_whole_are_refused():
    with pytest.raises(ValueError, match=r"replicated.*mlp.*change --config.mesh"):
        build(run(width=36, head_width=18, ffn_width=60), 256, jax.devices())
    # Where the mesh divides the sizes, or does not split at all, nothing is said.
    build(run(width=36, head_width=18, ffn_width=60), 256, jax.devices()[:4])


def test_without_their_compiler_cpus_stand_in_for_gpus(monkeypatch):
    monkeypatch.setattr(gpus, "compiler_is_here", lambda: False)
    found = topology.resolve("h100:4")
    assert (found.platform, found.compiled_for_it) == ("gpu", False)
    assert {d.platform for d in found.devices} == {"cpu"}


@pytest.mark.parametrize(
    ("name", "said"), [("h100-nvl:8", "not in the table"), ("h100:8", "no such plugin")]
)
def test_a_compiler_that_cannot_be_asked_is_told_and_cpus_stand_in(monkeypatch, name, said):
    def refuse(**_):
        raise RuntimeError("no such plugin")

    monkeypatch.setattr(gpus, "compiler_is_here", lambda: True)
    monkeypatch.setattr(topologies, "get_topology_desc", refuse)
    monkeypatch.setattr(process, "notes", [])
    assert not topology.resolve(name).compiled_for_it
    assert said in process.notes[0]


@pytest.mark.parametrize(("count", "shape"), [(4, "1x1x4"), (8, "1x1x8"), (64, "1x8x8")])
def test_gpus_are_described_with_their_hosts(monkeypatch, count, shape):
    asked = {}
    monkeypatch.setattr(
        topologies,
        "get_topology_desc",
        lambda **keys: asked.update(keys) or types.SimpleNamespace(devices=[None] * count),
    )
    assert len(gpus.devices(CHIPS["b200"], count)) == count
    assert asked["topology"] == shape
    assert "major: 10 minor: 0" in asked["target_config"]
    assert 'description_str: "NVIDIA B200"' in asked["target_config"]


def test_gpus_that_leave_a_host_half_empty_are_not_described():
    with pytest.raises(ValueError, match="12 GPUs are not whole hosts of 8"):
        gpus.devices(CHIPS["h100"], 12)


def plan_in_a_process(*arguments):
    """What a plan of a toy prints."""
    command = [sys.executable, "-m", "jaxlm.plan", f"--config={tiny.__file__}", *arguments]
    command += ["--config.model.vocabulary=256", "--config.model.width=256"]
    command += ["--config.data.length=128", "--config.model.heads=2"]
    environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "compiled for these devices" in done.stdout
    assert "it fits" in done.stdout
    assert "all-gather" in done.stdout
    return done.stdout


@pytest.mark.slow
def test_a_step_compiles_for_a_tpu_that_is_not_here():
    """Two slices of four chips, with the axis data between them."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, the TPU's compiler, is not installed: pip install libtpu")
    told = plan_in_a_process("--topology=v5e:2x2", "--slices=2", "--config.mesh.data=2")
    assert "8 × v5e in 2 slices, mesh data 2 × fsdp 4" in told
    assert "network" in told


@pytest.mark.slow
def test_a_step_compiles_for_gpus_that_are_not_here():
    """With kernels of ours and 8-bit floats; gradients are scattered."""
    if not gpus.compiler_is_here():
        pytest.skip("a GPU's compiler is not installed: pip install 'jax[cuda12]'")
    eight_bits = ("--config.model.quantize=fp8", "--config.model.dtype=bfloat16")
    told = plan_in_a_process("--topology=h100:4", *eight_bits)
    assert "4 × h100, mesh fsdp 4" in told
    assert "reduce-scatter" in told

"""The trace of a few steps: readable, with the named scopes, of the steps that were asked for."""

import re

import jax
import pytest
import toy

from jaxlm.methods import METHODS
from jaxlm.models.transformer import DecoderConfig, decoder
from jaxlm.optim.build import OptimizerSpec, build
from jaxlm.profile import Profile
from jaxlm.step import init_state, make_step


def test_only_steps_of_the_range_are_traced(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda *a, **k: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    for first, last, expected in [(1, 9, [4, 6]), (5, 9, [5, 6]), (7, 9, []), (1, 5, [4])]:
        calls.clear()
        with Profile(range(4, 7), tmp_path, lambda text: None) as profile:
            marks = []
            for step in range(first, last + 1):
                if profile.begins(step):
                    profile.begin(step)
                    marks.append(step)
                if profile.ends(step):
                    profile.end(step)
                    marks.append(step)
        assert marks == expected
        assert calls == ["start", "stop"] * bool(expected), "a trace cut short is ended too"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:builtin type:DeprecationWarning")  # jaxlib 0.12's reader
def test_the_trace_holds_the_scopes_and_the_steps(tmp_path):
    lm = decoder(DecoderConfig(vocabulary=32, width=16, layers=2, heads=2, scan_layers="on"), "cpu")
    method, batch = METHODS["next_token"](), toy.batch()
    tx, _ = build(OptimizerSpec(), 10, lm.axes)
    state = jax.jit(lambda key: init_state(lm.init(key), method, tx))(jax.random.key(0))
    step_fn = make_step(lm, method, tx).lower(state, batch, jax.random.key(0)).compile()
    said = []
    with Profile(range(2, 4), tmp_path / "profile", said.append) as profile:
        for step in range(1, 5):
            if profile.begins(step):
                profile.begin(step)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, metrics = step_fn(state, batch, jax.random.key(0))
            if profile.ends(step):
                jax.block_until_ready(metrics)
                profile.end(step)
    (file,) = (tmp_path / "profile" / "plugins" / "profile").glob("*/*.xplane.pb")
    assert str(tmp_path / "profile") in said[0]
    trace = jax.profiler.ProfileData.from_file(str(file))
    steps = []
    for plane in trace.planes:
        for line in plane.lines:
            steps += [dict(e.stats)["step_num"] for e in line.events if e.name == "train"]
    assert steps == [2, 3]
    # Where each operation comes from is in the program, which the trace carries.
    paths = set(re.findall(rb"jit\(step\)/[\w()/.<>\[\]-]*", file.read_bytes()))
    for scope in (b"attention", b"mlp", b"loss", b"optimizer", b"embedding"):
        inside = re.compile(rb"[/(]" + scope + rb"\)*/")
        assert any(inside.search(path) for path in paths), scope
    for scope in (b"attention", b"mlp"):
        backward = re.compile(rb"transpose\(.*" + scope)
        assert any(backward.search(path) for path in paths), scope

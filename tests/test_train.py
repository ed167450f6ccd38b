"""Whole runs as users start them: to the end, interrupted, killed, sharded, started wrongly."""

import json
import os
import re
import signal
import time

import numpy as np
import pytest
from whole_runs import environment, lines, losses, run, start

from jaxlm import goodput, train
from jaxlm.host import process as jaxlm_process

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(home):
    """The run that the others are held against."""
    flags = ("--config.steps=200", "--config.log.every=5", "--config.profile=3-4")
    out = run(home, "whole", *flags)
    return out, losses(home, "whole")


def test_a_run_leaves_what_it_promises(home, whole):
    out, curve = whole
    assert len(curve) == 200
    assert curve[-1] < 0.8 * curve[0]
    folder = home / "whole"
    for name in (
        "report.html",
        "train.log",
        "run.json",
        "results.json",
        "evals.jsonl",
        "samples.jsonl",
    ):
        assert (folder / name).stat().st_size > 0, name
    assert [e["step"] for e in lines(home, "whole", "evals.jsonl")] == [50, 100, 150, 200]
    assert [s["step"] for s in lines(home, "whole", "samples.jsonl")] == [100, 100, 200, 200]
    assert "[1/6]" in out
    assert "[6/6]" in out
    assert str(folder / "report.html") in out
    assert len(list((folder / "profile").rglob("*.xplane.pb"))) == 1
    assert f"traced steps 3 to 4 into {folder / 'profile'}" in out
    assert re.search(r"Goodput: [\d.]+% of [\d.]+ minutes, 1 start, in steps that count", out)
    assert "\x1b" not in out
    log = (folder / "train.log").read_text()
    before_the_log = "loading JAX"  # on a slow machine
    assert all(line in log or before_the_log in line for line in out.splitlines())
    results = json.loads((folder / "results.json").read_text())
    for source in ("code", "prose"):
        assert 0 < results["bits_per_char"][source] < 8
        assert set(results["compressors"][source]) == {"gzip", "bz2", "xz", "xz primed"}


def test_a_finished_run_says_so(home, whole):
    before = losses(home, "whole")
    out = run(home, "whole", "--config.steps=200", "--config.log.every=5")
    assert "finished" in out
    assert "--config.workdir" in out
    assert losses(home, "whole") == before


def test_generate_continues_a_prompt(home, whole):
    flags = (f"--workdir={home / 'whole'}", "--prompt=no", "--tokens=8")
    one, again = (generated(run(home, "", *flags, module="generate")) for _ in range(2))
    assert one.startswith("no")
    assert len(one) > 3
    assert again == one
    assert "there is no folder" in run(home, "", "--workdir=/nowhere", module="generate", code=1)


def test_generate_reads_and_writes_files(home, whole):
    asked, written = home / "asked.jsonl", home / "written.jsonl"
    asked.write_text('{"prompt": "def"}\n{"prompt": "The function"}\n')
    flags = (f"--checkpoint={home / 'whole'}", f"--prompts={asked}", f"--output={written}")
    flags = (*flags, "--samples=2", "--tokens=6", "--top_p=0.9", "--stop=\n\n", "--logprobs")
    run(home, "", *flags, module="generate")
    found = [json.loads(line) for line in written.read_text().splitlines()]
    assert [row["prompt"] for row in found] == ["def", "def", "The function", "The function"]
    assert [row["seed"] for row in found] == [0, 1, 0, 1]
    for row in found:
        assert len(row["logprobs"]) == len(row["ids"]) <= 6
        assert row["finish"] in ("stop", "length")
        assert "\n\n" not in row["text"]
    long = ("--prompt=" + "many words " * 500, "--tokens=2", f"--checkpoint={home / 'whole'}")
    refused = run(home, "", *long, module="generate", code=1)
    assert "keep its end only (--keep_end)" in refused
    assert "many words" not in refused
    out = run(home, "", *long, "--keep_end", module="generate")
    assert generated(out).startswith("many words")


def generated(out):
    """The text; on a slow machine it stands behind what is said while JAX is loading."""
    return "".join(line for line in out.splitlines(True) if "loading JAX" not in line)


def test_another_config_in_the_same_folder_is_refused(home, whole):
    out = run(home, "whole", "--config.steps=300", "--config.seed=5", code=1)
    assert "seed: 0 there, 5 here" in out
    assert "steps: 200 there, 300 here" in out
    assert len(out.splitlines()) < 8


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.01)


def steps_written(home, name):
    path = home / name / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def test_killed_and_interrupted_it_continues_bit_for_bit(home, whole):
    flags = ("--config.steps=200", "--config.log.every=5")
    process = start(home, "broken", *flags)
    wait_for(lambda: steps_written(home, "broken") > 25, process)
    process.kill()
    process.communicate()

    process = start(home, "broken", *flags)
    wait_for(lambda: steps_written(home, "broken") > 70, process)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 143, out
    assert "run the same command again" in out

    process = start(home, "broken", *flags)
    wait_for(lambda: steps_written(home, "broken") > 120, process)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130, out

    out = run(home, "broken", *flags)
    assert "continuing at step" in out
    assert losses(home, "broken") == whole[1]
    assert re.search(r"continuing at step .*\n  Goodput: .* 4 starts, in steps that count", out)
    told = lines(home, "broken", "events.jsonl")
    killed = next(i for i, e in enumerate(told) if e["kind"] == "resume")
    reached = max(e["step"] for e in told[:killed])
    found = goodput.goodput(told)
    assert found.starts == 4
    assert found.again == reached - told[killed]["step"], "the signals lost nothing, the kill did"
    assert found.seconds > sum(e["seconds"] for e in told)
    events = {e["kind"] for e in told}
    assert {"start", "resume", "interrupt"} <= events
    evals = [e["step"] for e in lines(home, "broken", "evals.jsonl")]
    assert evals == [50, 100, 150, 200]


def test_damaged_checkpoints_are_skipped_and_never_silently_started_over(home):
    flags = ("--config.steps=60", "--config.log.every=5")
    process = start(home, "damaged", *flags)
    wait_for(lambda: steps_written(home, "damaged") > 45, process)
    process.kill()
    process.communicate()
    log = home / "damaged" / "train.log"

    def finished():
        folders = (home / "damaged" / "checkpoints").glob("*/digest-*.json")
        whole = {path.parent for path in folders if path.parent.name.isdecimal()}
        return sorted(whole, key=lambda p: int(p.name))  # not one killed while it was deleted

    def damage(folder):
        for path in folder.rglob("d/*"):
            data = bytearray(path.read_bytes())
            data[len(data) // 2 : len(data) // 2 + 64] = os.urandom(64)
            path.write_bytes(data)

    last = finished()[-1]
    damage(last)
    process = start(home, "damaged", *flags)
    wait_for(lambda: "continuing at step" in log.read_text(), process)
    process.kill()
    process.communicate()
    assert f"Checkpoint {last.name} is skipped" in log.read_text()
    for folder in finished():
        damage(folder)
    out = run(home, "damaged", *flags, code=1)
    assert "none of the checkpoints" in out


def test_extras_survive_a_kill(home, whole):
    """One that nothing writes must come back as it was at the start, and one that is written."""
    flags = (
        "--config.method=next_token + learnability + ema",
        "--config.learnability.filter_ratio=0.5",
        f"--config.learnability.reference={home / 'whole'}",
        "--config.steps=60",
        "--config.log.every=5",
    )
    run(home, "extras", *flags)
    process = start(home, "extras-broken", *flags)
    wait_for(lambda: steps_written(home, "extras-broken") > 25, process)
    process.kill()
    process.communicate()
    run(home, "extras-broken", *flags)
    assert losses(home, "extras-broken") == losses(home, "extras")
    chosen = lines(home, "extras")[-1]
    assert len(chosen["selected/index"]) == len(chosen["selected/source"]) == 8
    last, broken = (lines(home, n, "evals.jsonl")[-1] for n in ("extras", "extras-broken"))
    assert "ema/bits_per_char/code" in last
    for key in last.keys() - {"seconds"}:
        assert last[key] == broken[key], key


def test_sharded_over_eight_devices_the_curve_is_the_same(home, whole):
    flags = ("--config.steps=200", "--config.log.every=5", "--config.eval.samples=")
    eight = "--xla_force_host_platform_device_count=8"
    run(home, "eight", *flags, "--config.mesh.fsdp=4", "--config.mesh.tensor=2", XLA_FLAGS=eight)
    np.testing.assert_allclose(losses(home, "eight"), whole[1], rtol=1e-5)
    one, eight = (lines(home, name, "evals.jsonl")[-1] for name in ("whole", "eight"))
    for key in one.keys() - {"seconds"}:
        np.testing.assert_allclose(one[key], eight[key], rtol=1e-4, err_msg=key)


def test_a_run_that_only_skips_updates_ends_and_says_from_where_to_go_on(home):
    flags = ("--config.optimizer.learning_rate=1e30", "--config.optimizer.clip=0")
    out = run(home, "skips", *flags, "--config.steps=100", code=1)
    assert "updates in a row were skipped" in out
    assert "last good checkpoint: none yet" in out
    assert "Traceback" not in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.optimizer.learnig_rate=3"], "did you mean --config.optimizer.learning_rate"),
        (["--config.learning_rate=3"], "did you mean --config.optimizer.learning_rate"),
        (["--config.steps=many"], "steps"),
        (["--config.batch=7", "--config.accumulate=2"], "config.batch=7"),
        (["--config.mesh.fsdp=3"], "mesh"),
        (["--config.method=nxt_token"], "next_token"),
        (["--config.method=ema"], "objective"),
        (["--config.model.heads=5"], "heads"),
        (["--config.optimizer.name=adamm"], "adam"),
        (["--config.optimizer.schedule=cosin"], "cosine"),
        (["--config.data.mix.code.source=/no/such/file.jsonl"], "/no/such/file.jsonl"),
        (["--config.data.mix.code.wieght=1"], "weight"),
        (["--config.data.tokenizer=/no/such/folder"], "/no/such/folder"),
        (["--config.init.checkpoint=/no/such/run"], "/no/such/run"),
        (["--config.eval.stride=33"], "config.eval.stride=33"),
        (["--config.checkpoint.every=0"], "every=0 must be at least 1"),
        (["--config.eval.samples=often"], "samples='often'"),
        (["--config.checkpoint.keep_best=loss/cod"], "loss/code"),
        (["--config.method=dpo"], "pairs"),
        (["--config.data.stages=0: cod=1"], "cod"),
        (["--config.data.stages=0: code=1; 0.8: prose=1; 0.805: code=1; 160: prose=1"], "160 rows"),
        (["--config.model.activation=swish"], "swiglu"),
        (["stray"], "stray"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(home, monkeypatch, capfd, flags, message):
    for name, value in environment(home).items():
        monkeypatch.setenv(name, value)
    command = ["train", "--config=tests/tiny.py", f"--config.workdir={home / 'wrong'}", *flags]
    monkeypatch.setattr("sys.argv", command)
    terminate = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        jaxlm_process.run(train.main)
    signal.signal(signal.SIGTERM, terminate)
    out = "".join(capfd.readouterr())
    assert ended.value.code == 1
    assert "Traceback" not in out
    last = [line for line in out.splitlines() if line.strip()][-1]
    assert message in last


def test_a_missing_recipe_is_told(home):
    out = run(home, "wrong", recipe="configs/quickstrat.py", code=1)
    assert "configs/quickstrat.py" in out
    said = [line for line in out.splitlines() if "loading JAX" not in line]  # a slow machine's
    assert len(said) == 1


def test_a_dry_run_writes_nothing(home):
    out = run(home, "dry", "--dry_run")
    assert not (home / "dry").exists()
    for part in ("--config.optimizer.learning_rate=0.003", "embedding", "epochs", "MiB", "minutes"):
        assert part in out, part


def test_two_runs_in_one_folder_do_not_mix(home):
    first = start(home, "twice", "--config.steps=5000")
    wait_for(lambda: steps_written(home, "twice") > 2, first)
    out = run(home, "twice", "--config.steps=5000", code=1)
    assert "another process" in out
    first.kill()
    first.communicate()

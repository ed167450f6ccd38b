"""Starting over with huge pages, quiet start, crashes as one line: in real processes."""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxlm.host import exhausted, gpu_memory, hardware, hugepages, process

ALL = ":".join(f"{name}={value}" for name, value in hugepages.TUNABLES.items())

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
from jaxlm.host import process
process.start(__name__)
import json, os, sys

def main():
    seen = {"pid": os.getpid(), "argv": sys.argv[1:], "env": dict(os.environ)}
    print(json.dumps(seen), flush=True)
    match sys.argv[1:]:
        case ["bug"]:
            return [][1]
        case ["bad int"]:
            return int("x")
        case ["ours"]:
            from jaxlm.sharding import MeshSpec
            MeshSpec(data=0).sizes(1)
        case ["full"]:
            raise OSError(28, "No space left on device", "/data/metrics.jsonl")
        case ["exit"]:
            raise SystemExit("nothing to do")
        case ["sleep", *_]:
            import time
            time.sleep(60)
        case ["seven"]:
            return 7

if __name__ == "__main__":
    process.run(main, *sys.argv[2:3])
"""


@pytest.fixture
def program(tmp_path):
    """Runs the program above from a folder with a space in its name; gives the finished process."""
    folder = tmp_path / "a b"
    folder.mkdir()
    (folder / "program.py").write_text(PROGRAM)

    def run(*args, python=(), wait=True, stdout=subprocess.PIPE, **env):
        drop = {"GLIBC_TUNABLES", hugepages.GUARD, "JAX_PLATFORMS", *process.QUIET}
        clean = {k: v for k, v in os.environ.items() if k not in drop and not k.startswith("JAX")}
        clean |= {"PYTHONPATH": f"{ROOT}:{folder}", "XDG_CACHE_HOME": str(tmp_path / "cache")}
        child = subprocess.Popen(
            [sys.executable, *python, "-m", "program", *args],
            env=clean | env,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
        )
        if not wait:
            return child
        child.out, child.err = child.communicate(timeout=120)
        return child

    return run


def said(child):
    return json.loads(child.out.splitlines()[-1])


on_request = pytest.mark.skipif(
    not hugepages._new_enough(), reason="this C library has none of the settings"
)


@on_request
def test_starts_over_once_with_the_same_arguments_and_process_id(program):
    child = program("x y", "", "--z=*", python=("-X", "dev", "-W", "ignore"))
    assert (child.returncode, child.err) == (0, "")
    assert said(child)["pid"] == child.pid
    assert said(child)["argv"] == ["x y", "", "--z=*"]
    assert said(child)["env"]["GLIBC_TUNABLES"] == ALL


@on_request
def test_other_tunables_are_kept(program):
    child = program(GLIBC_TUNABLES="glibc.malloc.arena_max=2")
    kept = ALL.removesuffix(":glibc.malloc.arena_max=1")
    assert said(child)["env"]["GLIBC_TUNABLES"] == "glibc.malloc.arena_max=2:" + kept


@pytest.mark.parametrize(
    ("python", "env"),
    [
        ((), {"JAXLM_HUGE_PAGES": "0"}),
        ((), {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}),
        (("-c", "import runpy; runpy.run_module('program', run_name='__main__')"), {}),
        (("-m", "cProfile", "-o", "/dev/null"), {}),
    ],
)
def test_does_not_start_over(program, python, env):
    child = program(python=python, **env)
    assert child.returncode == 0
    assert "hugetlb=1" not in said(child)["env"].get("GLIBC_TUNABLES", "")
    assert hugepages.GUARD not in said(child)["env"]


def test_an_import_changes_nothing(monkeypatch):
    before = dict(os.environ)
    process.start("jaxlm.train")
    assert dict(os.environ) == before


def test_the_users_environment_wins(program):
    child = program(TF_CPP_MIN_LOG_LEVEL="0", JAX_COMPILATION_CACHE_DIR="/x", MPLCONFIGDIR="/y")
    env = said(child)["env"]
    assert (env["TF_CPP_MIN_LOG_LEVEL"], env["JAX_COMPILATION_CACHE_DIR"]) == ("0", "/x")
    assert env["MPLCONFIGDIR"] == "/y"
    assert env["TRANSFORMERS_VERBOSITY"] == "error"


def test_compiled_programs_lie_in_the_cache(program, tmp_path):
    env = said(program())["env"]
    folder = Path(env["JAX_COMPILATION_CACHE_DIR"])
    assert folder.is_dir()
    assert folder.parent == tmp_path / "cache" / "jaxlm" / "xla"
    assert env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] == "0"


def test_goes_on_without_a_cache(program, tmp_path):
    (tmp_path / "file").write_text("")
    child = program(XDG_CACHE_HOME=str(tmp_path / "file"))
    assert child.returncode == 0
    assert "JAX_COMPILATION_CACHE_DIR" not in said(child)["env"]


@pytest.mark.parametrize(
    ("what", "code", "text"),
    [
        ("ours", 1, "error: mesh data=0"),
        ("full", 1, "error: /data/metrics.jsonl: No space left on device\n"),
        ("exit", 1, "nothing to do\n"),
        ("seven", 7, ""),
    ],
)
def test_what_the_user_can_mend_is_one_line(program, tmp_path, what, code, text):
    child = program(what)
    assert child.returncode == code
    assert child.err.startswith(text)
    assert child.err.count("\n") == (1 if text else 0)
    assert not list(tmp_path.rglob("crash-*"))


@pytest.mark.parametrize(
    ("what", "text"),
    [("bug", "IndexError: list index out of range"), ("bad int", "ValueError: invalid literal")],
)
def test_a_crash_is_one_line_and_a_file(program, tmp_path, what, text):
    child = program(what)
    assert child.returncode == process.CRASHED
    assert child.err.startswith(f"crashed: {text}")
    (file,) = (tmp_path / "cache" / "jaxlm").glob("crash-*.log")
    assert child.err.endswith(f"the full traceback is in {file}\n")
    assert "Traceback (most recent call last)" in file.read_text()
    assert f"-m program {shlex.quote(what)}\n" in file.read_text()


class JaxRuntimeError(Exception):
    """By this name it is known."""


TOO_LARGE = "Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G."


@pytest.mark.parametrize(
    ("words", "sizes"),
    [
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12884901888 bytes.", None),
        ("INTERNAL: Error dispatching computation: Out of memory allocating 1 bytes.", None),
        ("RESOURCE_EXHAUSTED: Error allocating device buffer: Attempting to allocate 4G.", None),
        (f"RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. {TOO_LARGE}", (20.5, 15.75)),
    ],
)
@pytest.mark.parametrize("gpu", ["", "NVIDIA H100"])
def test_running_out_of_a_devices_memory_is_for_the_user_to_mend(
    words, sizes, gpu, capsys, monkeypatch
):
    monkeypatch.setattr(hardware, "nvidia_gpu", lambda: gpu)
    error = JaxRuntimeError(f"{words}\nand a table")

    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        process.run(main, room="take less")
    assert ended.value.code == 1
    said = capsys.readouterr().err
    beside = "; nvidia-smi tells whether other programs hold some" * bool(gpu)
    assert said == f"error: a device's memory is too small for this ({words}){beside}; take less\n"
    found = exhausted.sizes(error)
    assert (found and tuple(size / 2**30 for size in found)) == sizes


@pytest.mark.parametrize(
    "error",
    [
        JaxRuntimeError("RESOURCE_EXHAUSTED: received message is larger than the maximum"),
        JaxRuntimeError("INTERNAL: a kernel failed"),
        JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 20M"),
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory"),
    ],
)
def test_other_ends_are_not_for_lack_of_memory(error):
    assert not exhausted.ran_out(error)
    assert exhausted.sizes(error) is None


def test_xla_says_it_in_these_words():
    with pytest.raises(jax.errors.JaxRuntimeError) as failed:
        jnp.zeros(2**50)
    assert exhausted.ran_out(failed.value)


def test_a_crash_goes_to_the_work_folder_once_it_is_known(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(process, "_crashes", [])

    def main():
        process.crash_folder(tmp_path / "work folder")
        raise KeyError("x")

    with pytest.raises(SystemExit) as ended:
        process.run(main)
    assert ended.value.code == process.CRASHED
    (file,) = (tmp_path / "work folder").iterdir()
    assert str(file) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "sent", "code", "text"),
    [
        ((), signal.SIGINT, 130, "Ctrl-C; the same command starts from the beginning"),
        (("it goes on",), signal.SIGTERM, 143, "SIGTERM; it goes on"),
        (("it goes on",), signal.SIGHUP, 129, "SIGHUP; it goes on"),
    ],
)
def test_stopped_it_says_what_the_same_command_does(program, args, sent, code, text):
    child = program("sleep", *args, wait=False)
    child.stdout.readline()
    child.send_signal(sent)
    assert child.communicate(timeout=60)[1] == f"stopped by {text}\n"
    assert child.returncode == code


def test_no_complaint_when_the_reader_has_gone(program):
    reader, writer = os.pipe()
    os.close(reader)
    child = program(stdout=writer)
    os.close(writer)
    assert (child.returncode, child.err) == (128 + signal.SIGPIPE, "")


class Device:
    def __init__(self, platform):
        self.platform = platform


def test_unused_gpu_is_named_with_the_remedy(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(hardware, "nvidia_gpu", lambda: "NVIDIA H100")
    monkeypatch.setattr(hardware, "_has", lambda module: False)
    text = process.unused_accelerator([Device("cpu")])
    assert "NVIDIA H100" in text
    assert 'pip install "jax[cuda12]"' in text
    assert process.unused_accelerator([Device("gpu")]) is None
    monkeypatch.setattr(hardware, "nvidia_gpu", lambda: "")
    monkeypatch.setattr(hardware, "tpu_is_here", lambda: True)
    assert "jax[tpu]" in process.unused_accelerator([Device("cpu")])
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # the user's own choice
    assert process.unused_accelerator([Device("cpu")]) is None


@pytest.mark.parametrize(
    ("here", "wanted"),
    [
        ({"libtpu"}, "cpu"),
        ({"libtpu", "tpu"}, None),
        ({"libtpu", "jax_plugins"}, None),
        ({"libtpu", "gpu"}, None),
        (set(), None),
    ],
)
def test_libtpu_without_a_tpu_is_not_started(monkeypatch, here, wanted):
    monkeypatch.setenv("JAX_PLATFORMS", "x")
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(hardware, "_has", here.__contains__)
    monkeypatch.setattr(hardware, "tpu_is_here", lambda: "tpu" in here)
    monkeypatch.setattr(hardware, "nvidia_gpu", lambda: "gpu" if "gpu" in here else "")
    hardware.avoid_absent_tpu()
    assert os.environ.get("JAX_PLATFORMS") == wanted


@pytest.mark.parametrize(
    ("gpu", "given", "wanted"),
    [
        ("NVIDIA H100", {}, ".94"),
        ("", {}, None),
        ("NVIDIA H100", {gpu_memory.VARIABLE: ".5"}, ".5"),
        ("NVIDIA H100", {gpu_memory.OLD: ".5"}, None),  # JAX refuses both together
    ],
)
def test_commands_ask_for_most_of_a_gpus_memory(monkeypatch, gpu, given, wanted):
    monkeypatch.setattr(hardware, "nvidia_gpu", lambda: gpu)
    monkeypatch.setattr(os, "environ", dict(given))
    gpu_memory.use()
    found = os.environ.get(gpu_memory.VARIABLE)
    assert found == wanted or float(found) == float(wanted)
    assert gpu_memory.share() == (0.5 if given else 0.94)


def test_a_share_that_is_no_number_is_told(monkeypatch):
    monkeypatch.setenv(gpu_memory.VARIABLE, "most")
    with pytest.raises(ValueError, match=r"XLA_CLIENT_MEM_FRACTION='most' must be a share"):
        gpu_memory.share()


def test_cache_dir(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/tmp/c d")
    assert process.cache_dir() == Path("/tmp/c d/jaxlm")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says the standard
    assert process.cache_dir() == Path.home() / ".cache" / "jaxlm"


TRAIN = """
import hashlib, jax, jax.numpy as jnp, optax
key = jax.random.key(0)
keys = jax.random.split(key, 3)
a, b = jax.random.normal(keys[0], (64, 2048)), jax.random.normal(keys[1], (2048, 64))
params = {"a": a / 8, "b": b / 40}
x_BD = jax.random.normal(keys[2], (1024, 64))
tx = optax.adamw(1e-3)
opt_state = tx.init(params)

@jax.jit
def step(params, opt_state):
    loss = lambda p: jnp.mean((jax.nn.gelu(x_BD @ p["a"]) @ p["b"] - jnp.sin(x_BD)) ** 2)
    value, grads = jax.value_and_grad(loss)(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, value

for _ in range(20):
    params, opt_state, value = step(params, opt_state)
print(float(value), hashlib.sha256(b"".join(bytes(params[k]) for k in "ab")).hexdigest())
"""


@pytest.mark.slow
def test_huge_pages_change_no_bit():
    def train(setting):
        env = dict(os.environ) | {"GLIBC_TUNABLES": setting, "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(
            [sys.executable, "-c", TRAIN], env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert train("glibc.malloc.hugetlb=0") == train(ALL)

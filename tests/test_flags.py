"""Compiler flags: only known ones, only where the accelerator is, and the user's stay as given."""

import os
import subprocess
import sys

import pytest

from jaxlm.host import flags, hardware

NAMES = [flag.name for flag in flags.SETS["gpu"].flags]


@pytest.fixture
def library(tmp_path):
    """A compiler that knows the first flag; the second is a removed one, still in a descriptor."""
    path = tmp_path / "libjax_common.so"
    path.write_bytes(
        b"\x7fELF\0..\0" + NAMES[0].encode() + b"\0..\x1f" + NAMES[1].encode() + b"\x18\x05\0"
        b"\0old_" + NAMES[2].encode() + b"\0" + NAMES[3].encode() + b"_percent\0"
    )
    return path


@pytest.fixture
def gpu(monkeypatch, library):
    """A machine with a GPU, whose compiler is `library`."""
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setattr(hardware, "nvidia_gpu", lambda: "NVIDIA H100")
    monkeypatch.setattr(flags, "_plugins", lambda: [library])
    monkeypatch.setattr(flags, "libraries", lambda platform: [library] * (platform == "gpu"))


def test_only_names_that_stand_alone_are_flags(library, tmp_path):
    known = flags.known_flags([library], NAMES, tmp_path / "cache")
    assert known == {NAMES[0]}


def test_a_name_must_be_known_to_every_library(library, tmp_path):
    other = tmp_path / "xla_cuda_plugin.so"
    other.write_bytes(b"\0nothing\0")
    assert flags.known_flags([library, other], NAMES, tmp_path / "cache") == set()


def test_answers_are_kept_by_library(library, tmp_path, monkeypatch):
    first = flags.known_flags([library], NAMES, tmp_path / "cache")
    looked = []
    monkeypatch.setattr(flags, "_look_up", lambda file, names: looked.append(file) or {})
    assert flags.known_flags([library], NAMES, tmp_path / "cache") == first
    assert looked == []
    library.write_bytes(library.read_bytes() + b"another version")
    with pytest.raises(KeyError):
        flags.known_flags([library], NAMES, tmp_path / "cache")
    assert looked == [library], "another library is looked at anew"


def test_an_unknown_flag_is_dropped_and_named(gpu, tmp_path, monkeypatch):
    (note,) = flags.use(tmp_path)
    assert os.environ.pop("XLA_FLAGS") == f"--{NAMES[0]}=true"
    assert all(name in note for name in NAMES[1:])
    assert NAMES[0] + "," not in note
    assert "libjax_common.so" in note


def test_the_users_flags_stay_and_win(gpu, tmp_path, monkeypatch):
    theirs = f"--{NAMES[0]}=false --xla_dump_to=/tmp/x"
    monkeypatch.setenv("XLA_FLAGS", theirs)
    flags.use(tmp_path)
    assert os.environ["XLA_FLAGS"] == theirs
    value, _ = flags.merged("gpu", {"XLA_FLAGS": theirs}, set(NAMES))
    assert value is not None
    assert value.endswith(" " + theirs)
    assert value.count(NAMES[0] + "=") == 1
    from_file = flags.merged("gpu", {"XLA_FLAGS": "flags.txt"}, set(NAMES))
    assert from_file == (None, []), "a value without a dash names a file of flags"


@pytest.mark.parametrize(
    ("variable", "value"), [("JAXLM_COMPILER_FLAGS", "0"), ("JAX_PLATFORMS", "cpu")]
)
def test_it_can_be_switched_off(gpu, tmp_path, monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    assert flags.use(tmp_path) == []
    assert "XLA_FLAGS" not in os.environ


def test_on_a_cpu_nothing_happens(monkeypatch, tmp_path):
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(hardware, "nvidia_gpu", lambda: "")
    monkeypatch.setattr(hardware, "tpu_is_here", lambda: False)
    monkeypatch.setattr(flags, "known_flags", lambda *_: pytest.fail("no library is read"))
    before = dict(os.environ)
    assert flags.use(tmp_path) == []
    assert dict(os.environ) == before


@pytest.mark.slow
def test_xla_agrees_with_what_its_library_was_read_to_know(tmp_path):
    removed = "xla_gpu_enable_async_collectives"  # a descriptor still lists it
    (library,) = flags.libraries("gpu")[:1]
    known = flags.known_flags([library], [*NAMES, removed], tmp_path)
    assert known == set(NAMES), "the set holds a flag that this jaxlib does not know"
    value, _ = flags.merged("gpu", {}, known)
    assert value is not None
    good = _start(XLA_FLAGS=value)
    assert good.returncode == 0, good.stderr
    assert removed in _start(XLA_FLAGS=f"--{removed}=true").stderr, "then no check is needed"


@pytest.mark.slow
@pytest.mark.skipif(not flags.libraries("tpu"), reason="needs libtpu (pip install libtpu)")
def test_libtpu_agrees_too(tmp_path):
    names = [flag.name for flag in flags.SETS["tpu"].flags]
    assert flags.known_flags(flags.libraries("tpu"), names, tmp_path) == set(names)
    value, _ = flags.merged("tpu", {}, set(names))
    assert value is not None
    compile_for = (
        "from jax.experimental import topologies;"
        "topologies.get_topology_desc(platform='tpu', topology_name='v5e:2x2')"
    )
    good = _start(compile_for, LIBTPU_INIT_ARGS=value)
    assert good.returncode == 0, good.stderr[-2000:]
    bad = _start(compile_for, LIBTPU_INIT_ARGS=value + " --xla_tpu_no_such_flag=true")
    assert bad.returncode != 0


def _start(code="import jax; jax.devices()", **environment):
    # libtpu: no questions to a cloud, no lock against other processes; it only compiles here.
    alone = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | alone | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )

"""The preflight's messages, also on Pythons that are too old; what the installer makes of pip."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / "tools" / "preflight.py"
OLD = [
    p for v in ("2.7", "3.6", "3.10") for p in Path.home().glob(f".pyenv/versions/{v}*/bin/python")
]


@pytest.fixture
def tools(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import install
    import preflight

    return preflight, install


def test_this_python_will_do():
    done = subprocess.run([sys.executable, TOOL], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip().splitlines()[-1].endswith("fine")


@pytest.mark.parametrize("python", OLD, ids=lambda p: p.parts[-3])
def test_an_old_python_is_told_what_to_do(python):
    done = subprocess.run([python, TOOL], capture_output=True, text=True)
    assert done.returncode == 1
    assert "jaxlm needs Python 3.11 or newer" in done.stderr
    assert "make PYTHON=/path/to/python3.13" in done.stderr
    assert "Traceback" not in done.stderr


def test_each_lack_is_named_with_its_remedy(tools, monkeypatch, capsys):
    preflight, _ = tools
    monkeypatch.setattr(preflight, "free_disk_gb", lambda folder: 0.25)
    assert preflight.main(["preflight"]) == 1
    assert "0.2 GB of disk free, and" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    assert preflight.main(["preflight"]) == 1
    assert f"python3.{sys.version_info.minor}-venv" in capsys.readouterr().err


def test_little_memory_is_a_warning(tools, monkeypatch, capsys):
    preflight, _ = tools
    monkeypatch.setattr(preflight, "free_memory_gb", lambda: 0.5)
    assert preflight.main(["preflight"]) == 0
    assert "warning: 0.5 GB of memory are free" in capsys.readouterr().out


def test_an_environment_of_another_python_is_refused(tools, tmp_path, capsys):
    preflight, _ = tools
    (tmp_path / "pyvenv.cfg").write_text("home = /usr/bin\nversion = 3.8.1\n")
    assert preflight.main(["preflight", str(tmp_path)]) == 1
    assert "was made with Python 3.8.1" in capsys.readouterr().err


def test_pip_is_followed_and_an_interrupted_installation_begun_anew(
    tools, tmp_path, monkeypatch, capsys
):
    _, install = tools
    monkeypatch.chdir(tmp_path)
    for name in ("VENV", "BROKEN", "LOG"):
        monkeypatch.setattr(install, name, tmp_path / "a b" / getattr(install, name))
    install.VENV.mkdir(parents=True)
    install.BROKEN.touch()
    (install.VENV / "left over").touch()
    made = []
    monkeypatch.setattr(install, "make", lambda: made.append(install.VENV.mkdir()))
    was_marked = []
    monkeypatch.setattr(install, "pip", lambda *_: was_marked.append(install.BROKEN.exists()))
    assert install.main(["dev"]) == 0
    assert len(made) == 1
    assert was_marked == [True]
    assert sorted(p.name for p in install.VENV.iterdir()) == ["installed", "installed-dev"]
    assert "not whole: begun anew" in capsys.readouterr().out


def test_a_failing_pip_is_quoted_with_the_remedies(tools, tmp_path, monkeypatch, capsys):
    _, install = tools
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(install, "LOG", tmp_path / "install.log")
    script = tmp_path / "python"
    script.write_text(
        '#!/bin/sh\necho "Collecting jax"\necho "ERROR: No matching distribution"\nexit 1\n'
    )
    script.chmod(0o755)
    monkeypatch.setattr(install, "works", lambda python: True)
    monkeypatch.setattr(install, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(install, "BROKEN", tmp_path / "incomplete")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    script.rename(tmp_path / ".venv" / "bin" / "python")
    assert install.main(["dev"]) == 1
    out = capsys.readouterr().out
    assert "ERROR: No matching distribution" in out
    assert out.splitlines()[-1].startswith("error: pip could not install the packages")
    assert "PIP_FIND_LINKS and PIP_NO_INDEX=1" in out
    assert (tmp_path / "incomplete").exists()
    assert "Collecting jax" in (tmp_path / "install.log").read_text()


def test_make_lists_its_targets():
    done = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert all(
        f"make {t}" in done.stdout for t in ("quickstart", "test", "check", "bench", "clean")
    )

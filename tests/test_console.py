"""The console on a terminal (a pty), in a pipe, in ASCII, with stdout closed; and its log."""

import fcntl
import io
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time

import pytest

from jaxlm.host import console as console_module
from jaxlm.host.console import Console
from jaxlm.host.progress import Progress
from jaxlm.host.terminal import clock, count, duration, table_lines

RUN = """
import sys, time
from jaxlm.host import console
console.PLAIN_EVERY = 0.2
with console.Console(sys.argv[1]) as c:
    with c.phase(1, 2, "data", "building the corpora"):
        time.sleep(0.5)
        c.say("déjà vu … × \\x1b[31mred")
    with c.phase(2, 2, "train", "training"):
        for step in range(1, 5):
            c.progress(step, 4, loss=2.5, bits_per_char=1.25, tokens_per_second=9123.0)
            time.sleep(0.15)
        c.warn("the moon is full")
"""


@pytest.fixture
def calm(monkeypatch):
    for name in ("NO_COLOR", "CLICOLOR_FORCE", "CI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")


def child(tmp_path, code=RUN, **env):
    """Command and environment of a Python that runs the code with a log path as its argument."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    clean = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "CI", "CLICOLOR_FORCE")}
    environment = clean | {"PYTHONPATH": root, "TERM": "xterm"} | env
    return [sys.executable, "-c", code, str(tmp_path / "train.log")], environment


def on_terminal(tmp_path, columns=80, **env):
    """What the run writes to a terminal of that width."""
    command, environment = child(tmp_path, **env)
    here, there = pty.openpty()
    fcntl.ioctl(there, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen(command, env=environment, stdout=there, stderr=there)
    os.close(there)
    output = b""
    while select.select([here], [], [], 60)[0]:
        try:
            piece = os.read(here, 4096)
        except OSError:  # Linux: the other side has been closed
            break
        if not piece:
            break
        output += piece
    os.close(here)
    assert process.wait() == 0, output
    return output.decode()


def test_terminal_gets_a_live_line_and_the_log_plain_ones(tmp_path):
    output = on_terminal(tmp_path)
    assert "\r\x1b[K" in output
    assert "⠙ building the corpora … " in output
    assert "step 4/4" in output
    log = (tmp_path / "train.log").read_text("utf-8")
    assert "\x1b" not in log
    assert "\r" not in log
    assert re.match(
        r"\[1/2\] data: building the corpora\n  … still building the corpora, \d s\n", log
    )
    assert "100% · step 4/4 · loss 2.500 · 1.250 bits/char · 9.1k tok/s\n" in log
    assert log.endswith("1 warning in this run:\n  - the moon is full\n")


def test_live_line_fits_a_narrow_terminal(tmp_path):
    output = on_terminal(tmp_path, columns=30)
    drawn = re.findall(r"\x1b\[\?7l(.*?)\x1b\[\?7h", output)
    assert drawn
    assert max(map(len, drawn)) <= 29
    assert any("/4" in line for line in drawn)


def test_no_color_keeps_the_live_line_and_dumb_terminals_get_plain_lines(tmp_path):
    output = on_terminal(tmp_path, NO_COLOR="1")
    assert not re.search(r"\x1b\[[0-9;]*m", output)
    assert "\r\x1b[K" in output
    assert "\x1b" not in on_terminal(tmp_path, TERM="dumb", CLICOLOR_FORCE="0")


def test_pipe_gets_what_the_log_gets(tmp_path):
    command, environment = child(tmp_path)
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8")
    assert done.returncode == 0
    assert done.stderr == ""
    assert done.stdout == (tmp_path / "train.log").read_text("utf-8")
    assert "\x1b" not in done.stdout
    assert "déjà vu … × \\x1b[31mred" in done.stdout


def test_forced_color_in_a_pipe_has_no_live_line(tmp_path):
    command, environment = child(tmp_path, CLICOLOR_FORCE="1")
    output = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8").stdout
    assert "\x1b[1m[1/2] data" in output
    assert "\r" not in output


def test_ascii_stdout(tmp_path):
    command, environment = child(tmp_path, PYTHONIOENCODING="ascii", LANG="C", LC_ALL="C")
    done = subprocess.run(command, env=environment, capture_output=True, encoding="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert "d?j? vu ... x \\x1b[31mred" in done.stdout
    assert "déjà vu …" in (tmp_path / "train.log").read_text("utf-8")


@pytest.mark.parametrize("how", ["reader gone", "closed"])
def test_goes_on_without_stdout(tmp_path, how):
    command, environment = child(tmp_path)
    if how == "closed":
        command = ["sh", "-c", '"$@" >&-', "sh", *command]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert (process.wait(), errors) == (0, b"")
    assert (tmp_path / "train.log").read_text("utf-8").endswith("the moon is full\n")


def test_heartbeat_and_progress_share_one_cadence(monkeypatch, calm):
    monkeypatch.setattr(console_module, "PLAIN_EVERY", 0.3)
    stream = io.StringIO()
    with Console(stream=stream) as console, console.phase(1, 1, "train", "training"):
        deadline = time.monotonic() + 30
        console.progress(1, 10, loss=3.0)
        while "step 1/10" not in stream.getvalue() and time.monotonic() < deadline:
            console.progress(1, 10, loss=3.0)
            time.sleep(0.01)
        console.note("compiling")
        while "… compiling" not in stream.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
    lines = stream.getvalue().splitlines()
    assert "  10% · step 1/10 · loss 3.000" in lines
    assert "  … compiling" in lines
    assert lines.count("  10% · step 1/10 · loss 3.000") <= 3


def test_quiet_says_nothing_and_still_collects_warnings(tmp_path, calm):
    stream, heard = io.StringIO(), []
    with Console(tmp_path / "log", stream=stream, quiet=True) as console:
        console.on_warning(heard.append)
        with console.phase(1, 1, "a", "b"):
            console.progress(1, 2)
            console.say("hello")
            console.warn("careful")
    assert stream.getvalue() == ""
    assert not (tmp_path / "log").exists()
    assert heard == ["careful"]


def test_log_that_is_known_late_has_everything(tmp_path, calm):
    stream = io.StringIO()
    with Console(stream=stream) as console:
        console.say("one\ntwo")
        console.warn("early")
        heard = []
        console.on_warning(heard.append)
        console.log_to(tmp_path / "a b" / "train.log")
        console.error("late")
    text = (tmp_path / "a b" / "train.log").read_text("utf-8")
    assert text == stream.getvalue()
    assert text.startswith("one\ntwo\nwarning: early\nerror: late\n")
    assert heard == ["early"]


def test_log_names_the_error_that_ended_the_run(tmp_path, calm):
    with pytest.raises(ValueError, match="no such"), Console(tmp_path / "log", io.StringIO()):
        raise ValueError("no such source")
    assert (tmp_path / "log").read_text() == "stopped by ValueError: no such source\n"


def test_time_left_follows_the_recent_rate(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    progress = Progress("training")
    for step in range(11):  # a resumed run: starts at 100
        clock[0] = 2.0 * step
        progress.move(100 + step, 200, "", "step", {"loss": float("nan"), "note": None})
    assert progress.line() == "  55% · step 110/200 · 3:00 left · loss nan"
    progress.move(3, 0, "scanning", "file", {})
    assert progress.line() == "  scanning · file 3"
    assert progress.still(clock[0]) == "  … scanning"
    assert progress.still(clock[0] + 5) == "  … still scanning, 5 s"


def test_live_line_of_a_run_fits_eighty_columns(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = Progress("training")
    fields = {"loss": 2.267, "bits_per_char": 1.2, "tokens_per_second": 9123.0}
    for step in (1204, 1234):
        progress.move(step, 2000, "", "step", fields | {"peak_fraction": 0.34})
        now[0] += 5
    everything = "1,234/2,000  2:08 left  loss 2.267  1.200 bits/char  9.1k tok/s  34% of peak"
    assert progress.live_line(79, now[0])[2:] == everything
    assert progress.live_line(40, now[0])[2:] == "1,234/2,000  2:08 left  loss 2.267"
    wide = progress.live_line(120, now[0])[2:]
    assert wide.startswith(
        "██████████████░░░░░░░░░░ 62% step 1,234/2,000 · 2:08 left · loss 2.267 · "
    )


def test_progress_that_stands_still_is_no_news():
    progress = Progress("training the tokenizer")
    progress.move(0, 0, "", "", {})
    assert not progress.news
    assert "training the tokenizer" in progress.live_line(80, progress.start)
    progress.move(1, 2, "", "", {})
    assert progress.news
    progress.news = False
    progress.move(1, 2, "", "", {})
    assert not progress.news


def test_words():
    assert [duration(s) for s in (0.4, 8, 125, 11400, 90000)] == [
        "0 s", "8 s", "2 min 05 s", "3 h 10 min", "1 d 1 h",
    ]  # fmt: skip
    assert duration(1.26, fine=True) == "1.3 s"
    assert [clock(s) for s in (8.4, 125, 11400)] == ["0:08", "2:05", "3:10:00"]
    assert [count(n) for n in (0, 950, 9123, 128_000, 999_960, 1.3e6, 4.8e11)] == [
        "0", "950", "9.1k", "128k", "1.0M", "1.3M", "480G",
    ]  # fmt: skip
    assert table_lines([["code", 1.25, 1200], ["prose", None, 5]], ["source", "bits", "n"]) == [
        "  source   bits      n",
        "  code    1.250  1,200",
        "  prose       –      5",
    ]

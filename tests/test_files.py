"""Where commands write: on file systems, whichever command it is."""

import sys

import pytest
from tiny import get_config

from jaxlm import config, convert, files
from jaxlm.evaluate import __main__ as evaluate
from jaxlm.generate import __main__ as generate
from jaxlm.studies import __main__ as studies


def test_a_file_is_there_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    files.write_atomically(path, "whole")
    with pytest.raises(UnicodeEncodeError):
        files.write_atomically(path, "\ud800")
    assert path.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["runs/a", "/runs/a", "a:b", "c//d", "~/runs"])
def test_paths_are_paths(name):
    assert files.local(name, "--output").name == name.rpartition("/")[2]


def train(place, monkeypatch):
    c = get_config()
    c.workdir = place
    config.check(c)


def into(module, words, act):
    def run(place, monkeypatch):
        monkeypatch.setattr(sys, "argv", ["command", *(word.format(place) for word in words)])
        act(module)

    return run


COMMANDS = {
    "config.workdir": train,
    "--output": into(
        generate, ["--checkpoint=x", "--output={}"], lambda m: m._checked(m._flags().parse_args())
    ),
    "--output of evaluate": into(
        evaluate,
        ["--checkpoint=x", "--compression=y", "--output={}"],
        lambda m: m._refuse(m._flags().parse_args()),
    ),
    "OUT": into(convert, ["to-hf", "x", "{}"], lambda m: m.main()),
    "--out": into(studies, ["lift", "--out={}"], lambda m: m._asked(sys.argv[1:])),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("place", ["gs://bucket/run", "s3://bucket/run", "file:///run"])
def test_an_address_is_refused_before_anything_is_written(command, place, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    said = rf"{command.split()[0]}='{place}' is an address.*mount it .*or leave out"
    with pytest.raises(ValueError, match=said):
        COMMANDS[command](place, monkeypatch)
    assert not list(tmp_path.iterdir())

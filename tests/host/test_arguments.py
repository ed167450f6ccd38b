"""A wrong flag is one sentence, with the flag that may be meant."""

import pytest

from jaxlm.host.arguments import Parser


def said(capsys, parser, *words):
    with pytest.raises(SystemExit) as end:
        parser.parse_args(words)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_of_a_flag_that_is_none_the_nearest_is_named(capsys):
    parser = Parser("python -m x")
    parser.add_argument("--temperature", type=float)
    line = said(capsys, parser, "--temprature=1")
    assert line.startswith(
        "python -m x: there is no flag --temprature; did you mean --temperature?"
    )
    assert "there is no flag --temp;" in said(capsys, parser, "--temp=1"), "no abbreviations"
    assert "there is no flag --zzz (" in said(capsys, parser, "--zzz")
    assert "a flag is given as --NAME=VALUE" in said(capsys, parser, "here")
    assert "--temperature: invalid float value: 'hot'" in said(capsys, parser, "--temperature=hot")


def test_the_flags_of_a_part_of_a_command_are_known(capsys):
    parser = Parser("python -m x")
    parser.add_subparsers(dest="way", required=True).add_parser("go").add_argument("--dtype")
    assert "did you mean --dtype?" in said(capsys, parser, "go", "--dtyp=x")
    assert parser.parse_args(["go", "--dtype=x"]).dtype == "x"

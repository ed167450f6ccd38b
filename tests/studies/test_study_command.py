"""`python -m jaxlm.studies`: what it lists, refuses, and leaves behind."""

import dataclasses
import json
import re
import sys

import numpy as np
import pytest

from jaxlm.studies import __main__ as command
from jaxlm.studies import tr_dpo


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["studies", *arguments])
    return command.main()


def test_kept_arms_depend_on_all_that_makes_their_numbers():
    made_by = "\n".join(command._source("tr_dpo"))
    for part in ("follow", "dpo", "make_step", "decoder", "limited", "class Generator", "run"):
        assert re.search(rf"^(def )?{part}\b", made_by, re.MULTILINE), part
    assert "\ndef tell(" not in made_by


def test_settings_without_an_update_are_refused():
    settings = dataclasses.replace(tr_dpo.Settings(), every=(16, 512), steps=512)
    with pytest.raises(ValueError, match="every=512"):
        tr_dpo.run(settings, None, None)


def test_without_a_name_it_lists_what_there_is(monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch)
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert all(name in said for name in command.STUDIES)


def test_a_wrong_name_or_key_is_refused(monkeypatch, capsys):
    for arguments in (["tr_dop"], ["tr_dpo", "--steps=few"], ["tr_dpo", "--step_count=3"]):
        with pytest.raises(SystemExit) as ended:
            call(monkeypatch, *arguments)
        assert ended.value.code == 2
    assert "'few'" in capsys.readouterr().err


def test_settings_are_keys(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["studies", "tr_dpo", "--quick", "--betas", "1", "2"])
    name, settings, out = command._asked()
    assert (name, str(out)) == ("tr_dpo", "runs/studies/tr_dpo")
    assert settings == dataclasses.replace(tr_dpo.QUICK, betas=(1.0, 2.0))


@pytest.mark.slow
def test_a_small_study_is_whole_and_kept(monkeypatch, capsys, tmp_path):
    small = "--steps=8 --looks=2 --every 4 --betas 1 --more_betas --width=16 --layers=1"
    arguments = ["tr_dpo", "--quick", f"--out={tmp_path}", *small.split()]
    assert call(monkeypatch, *arguments) == 0
    assert {"report.html", "figure.png", "results.json"} <= {p.name for p in tmp_path.iterdir()}
    found = json.loads((tmp_path / "results.json").read_text())
    assert set(found["arms"]) == {"fixed beta=1", "hard/4 beta=1", "soft/4 beta=1"}
    for arm in found["arms"].values():
        assert arm["step"] == [0, 4, 8]
        np.testing.assert_allclose(np.array(arm["kl"])[:, 0], 0, atol=1e-4)
        assert len(arm["loss"]) == 8
    assert found["verdicts"][3]["holds"]  # the loss begins anew, whatever holds at this size
    said = capsys.readouterr().out
    assert all(verdict["numbers"] in said for verdict in found["verdicts"])
    assert "arms are kept" not in said
    assert call(monkeypatch, *arguments) == 0
    assert "3 of 3 arms are kept" in capsys.readouterr().out
    assert json.loads((tmp_path / "results.json").read_text())["arms"] == found["arms"]

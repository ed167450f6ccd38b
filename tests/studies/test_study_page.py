"""The page of a study: all of it in one file, which says what the verdicts say."""

import json

import pytest

from jaxlm.studies import page

TOLD = page.Told(
    "A study",
    [
        page.Verdict("one is one", True, "It is 1."),
        page.Verdict("one is <two>", False, "It is 1 & not 2."),
    ],
    [page.Table("Numbers of it", ["arm", "score"], [["one", "1.0 ± 0.1"]], "A note.")],
    [
        page.Panel("One", "x", "y", [page.Line("a", [0, 1], [1, 2], [0, 1], [2, 3])]),
        page.Panel("Two", "x", "y", [page.Line("b", [1, 10], [1, 2])], log_x=True, levels=[1.5]),
        page.Panel("Three", "x", "y", [page.Line("c", [0], [1]), page.Line("d", [1], [1])]),
    ],
    ["How it was done."],
)


@pytest.mark.slow  # matplotlib takes its time to import
def test_a_page_is_one_file(tmp_path):
    where = page.write(tmp_path, TOLD, {"seeds": 3}, {"one": {"score": [1.0]}})
    text = where.read_text()
    assert "<b>Reproduced</b>: one is one." in text
    assert "<b>Not reproduced</b>: one is &lt;two&gt;." in text
    assert "It is 1 &amp; not 2." in text
    for piece in ("Numbers of it", "1.0 ± 0.1", "A note.", "How it was done.", "seeds"):
        assert piece in text
    assert "data:image/png;base64,iVBOR" in text
    assert "http://" not in text.replace("http-equiv", "")
    assert "<script" not in text
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["arms"] == {"one": {"score": [1.0]}}
    assert [verdict["holds"] for verdict in record["verdicts"]] == [True, False]

"""The report page: whatever a work folder holds, a sound and self-contained page comes out."""

import html.parser
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from report_folder import SOURCES, make

from jaxlm import report
from jaxlm.report import axes, chart, cost, markup, read, series, tasks

VOID = {"meta", "link", "br", "hr", "col"}
FILES = read.FILES


class Page(html.parser.HTMLParser):
    """The elements, attributes and visible text of a page; fails on tags that do not balance."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.ours: list[str] = []  # words that are not quoted from the run
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        assert len(attrs) == len(dict(attrs)), f"an attribute twice on {tag}: {attrs}"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open[-1:] == [tag], f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.words.append(data)
            if "pre" not in self.open:
                self.ours.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))

    def count(self, tag: str, kind: str) -> int:
        return sum(t == tag and kind in (a.get("class") or "").split() for t, a in self.elements)


def write(folder) -> tuple[str, Page]:
    """The page of a folder as text and parsed; no part of it may have failed."""
    text = report.write(folder).read_text("utf-8")
    page = Page(text)
    assert not re.findall(r"could not be drawn \(.*?\)\.", page.text)
    raw = re.search(r".*\b(nan|inf|None|Infinity)\b.*", "\n".join(page.ours))
    assert not raw, f"a raw value is shown: {raw}"
    return text, page


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return make(tmp_path_factory.mktemp("a run") / "with space", 300)


@pytest.fixture(scope="module")
def drawn(finished):
    return write(finished)


def test_page_says_what_a_reader_asks(drawn):
    _, page = drawn
    for words in (
        "Finished",
        "below primed xz",
        "bits per character",
        "18 % less than xz primed (1.490)",
        "weights are not counted",
        "overlap by half",
        "after 10",
        "after 50",
        "after 100",
        "textwrap.py",
        "Best predicted: code",
        "Worst predicted: prose",
        "--config=configs/quickstart.py",
        "next_token ·",
        "a473cc05d1e2",
        "optimizer.learning_rate",
        "1 update was skipped",
        "waiting for data",
        "Goodput",
        "2 starts",
        "held out documents",
        "Mixture",
        "Learning rate",
        "Gradient norm",
        "Throughput",
    ):
        assert words in page.text, words


def test_page_loads_nothing(drawn):
    text, page = drawn
    for tag, attributes in page.elements:
        assert tag not in {"img", "iframe", "object", "embed", "base", "form"}
        for name in ("src", "href", "srcset", "action", "data", "poster", "xlink:href"):
            value = attributes.get(name) or "#"
            assert value.startswith(("#", "data:")), (tag, name, value)
        assert not any(name.startswith("on") for name in attributes), attributes
    assert not re.search(r"https?://|@import|url\(", re.sub(r"<pre.*?</pre>", "", text, flags=re.S))
    policy = next(a["content"] for t, a in page.elements if t == "meta" and "http-equiv" in a)
    assert "default-src 'none'" in policy
    assert "script-src 'sha256-" in policy


def test_compressors_are_lines_on_the_curve_of_each_source(drawn):
    text, _ = drawn
    figures = re.findall(r'<figure class="chart.*?</figure>', text, flags=re.S)
    for name, (_, _, rivals, _) in SOURCES.items():
        figure = next(f for f in figures if f"Bits per character: {name}" in f)
        assert figure.count('class="rule"') == len(rivals) == 4
        for rival, value in rivals.items():
            assert f"{rival} <b>{value:.3f}</b>" in figure


def test_all_text_is_escaped(tmp_path):
    evil = (
        "</script></pre><script>alert(1)</script><img src=x onerror=alert(1)>\"'&\x00\ud800\u202e"
    )
    folder = make(tmp_path, 30, sources={evil: SOURCES["code"]})
    sample = {"step": 3, "fraction": 0.1, "source": evil, "prompt": evil, "text": evil}
    (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    (folder / "events.jsonl").write_text(json.dumps({"kind": "warning", "text": evil}) + "\n")
    run = json.loads((folder / "run.json").read_text())
    run |= {"command": evil, "device": evil, "versions": {evil: evil}, "commit": evil}
    run["config"] |= {evil: {evil: evil}}
    run["config_diff"] = {evil: [evil, evil]}
    run["parameters_by_part"] = {evil: 3}
    (folder / "run.json").write_text(json.dumps(run))
    results = json.loads((folder / "results.json").read_text())
    results |= {"verdict": [evil], "context": evil}
    results["passages"] = [{"source": evil, "name": evil, "tokens": [[evil, 1.0], [evil, None]]}]
    results["documents"] = {evil: [{"name": evil, "characters": 1, "bits_per_char": 1.0}]}
    (folder / "results.json").write_text(json.dumps(results))
    text, page = write(folder)
    assert sum(tag == "script" for tag, _ in page.elements) == 1
    assert not any(tag == "img" for tag, _ in page.elements)
    assert "alert(1)" in page.text
    assert "\x00" not in text


@pytest.mark.parametrize("gone", FILES)
def test_each_file_may_be_missing(finished, tmp_path, gone):
    for name in FILES:
        if name != gone:
            (tmp_path / name).write_bytes((finished / name).read_bytes())
    _, page = write(tmp_path)
    assert ("Unfinished" if gone == "results.json" else f"{gone} is missing") in page.text


@pytest.mark.parametrize("only", FILES)
def test_each_file_may_be_alone(finished, tmp_path, only):
    (tmp_path / only).write_bytes((finished / only).read_bytes())
    write(tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_files_cut_anywhere(finished, tmp_path, name):
    for other in FILES:
        (tmp_path / other).write_bytes((finished / other).read_bytes())
    whole = (finished / name).read_bytes()
    for keep in (0, 1, len(whole) // 3, len(whole) - 4):
        (tmp_path / name).write_bytes(whole[:keep])
        _, page = write(tmp_path)
        if keep > 1:
            kind = "half-written" if name.endswith("jsonl") else "incomplete"
            assert kind in page.text


def test_an_interrupted_run_says_so(finished, tmp_path):
    for name in ("run.json", "metrics.jsonl"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    events = (finished / "events.jsonl").read_text().splitlines(keepends=True)
    stop = next(i for i, line in enumerate(events) if '"interrupt"' in line)
    (tmp_path / "events.jsonl").write_text("".join(events[: stop + 1]))
    _, page = write(tmp_path)
    assert "Interrupted" in page.text
    assert "The same command continues it." in page.text


def test_values_that_are_no_numbers(tmp_path):
    bad = [float("nan"), float("inf"), -float("inf"), None, "x", [1], {}, True, 10**400, -1e308]
    rows = [
        {"step": i + 1, "tokens": 10 * (i + 1), "loss": v, "norm/grads": v, "learning_rate": v}
        for i, v in enumerate(bad * 3)
    ]
    rows[3]["step"] = None
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(lines + "[1]\nnull\n\n3\n")
    (tmp_path / "evals.jsonl").write_text(lines.replace('"loss"', '"bits_per_char/code"'))
    results = {"bits_per_char": {"code": float("nan")}, "compressors": {"code": {"xz": None}}}
    results |= {"passages": [{"tokens": [["a", float("inf")], ["b"], 3]}, None], "documents": []}
    (tmp_path / "results.json").write_text(json.dumps(results))
    (tmp_path / "run.json").write_text(
        '{"parameters": NaN, "config": 3, "data_card": [], "mesh": 1}'
    )
    _, page = write(tmp_path)
    assert "3 lines of metrics.jsonl, first line 31, could not be read." in page.text


@pytest.mark.slow
def test_long_runs_stay_small(tmp_path):
    many = {f"source {i}": SOURCES["code"] for i in range(6)}
    folder = make(tmp_path, 100_000, sources=many)
    text, page = write(folder)
    assert len(text.encode()) < 1_000_000
    assert page.count("figure", "chart") >= 12


def test_a_spike_stays_visible():
    y = np.ones(100_000)
    y[54_321] = 9.0
    _, low, high = series.envelope(np.arange(100_000.0), y)
    assert high.max() == 9.0
    assert low.min() == low.max() == 1.0
    assert len(high) == series.BUCKETS


def test_a_metric_of_some_steps_is_a_whole_line():
    x, y = np.arange(1000.0), np.full(1000, np.nan)
    y[::10] = 2.0
    drawn = chart.chart("A", "b", [chart.Line("c", x, y, noisy=True)])
    (curve,) = re.findall(r'<path d="([^"]*)" class="line ink" data-name', drawn)
    assert (curve.count("M"), curve.count("L")) == (1, 99)
    assert "Steps without a finite value: 900." in drawn


def test_labels_of_close_lines_keep_apart():
    rules = [axes.Rule(str(i), 2.0 + i / 1000) for i in range(5)]
    drawn = axes.margin(rules, series.Scale(0.0, 2.0))
    places = [float(top) for top in re.findall(r"top:([\d.]+)px", drawn)]
    assert min(np.diff(places)) >= axes.LABEL
    assert 0 < places[0] < places[-1] < axes.HEIGHT


def test_smoothing_keeps_what_is_not_there_out():
    assert series.smooth(np.full(50, 3.0), 9, np.arange(50)).tolist() == [3.0] * 50
    y = series.smooth(np.array([1.0, np.nan, 3.0, np.inf, 5.0]), 5, np.arange(5))
    assert np.isnan(y[[1, 3]]).all()
    np.testing.assert_allclose(y[[0, 2, 4]], [1.0, 3.0, 4.0])


@pytest.mark.parametrize(
    ("scale", "ticks"),
    [
        (series.Scale(0.0, 1.0), [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (series.Scale(-3.0, 4_096_000.0), [0.0, 1e6, 2e6, 3e6, 4e6]),
        (series.Scale(0.2, 40.0, log=True), [0.3, 1.0, 3.0, 10.0, 30.0]),
    ],
)
def test_ticks_are_round(scale, ticks):
    np.testing.assert_allclose(scale.ticks(), ticks)


def test_a_step_written_twice_counts_once(tmp_path):
    rows = [{"step": s, "loss": loss} for s, loss in [(1, 5.0), (2, 4.0), (3, 9.0), (2, 4.5)]]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = read.load(tmp_path)
    assert folder.metrics["loss"].tolist() == [5.0, 4.5, 9.0]
    assert any("more than once" in notice for notice in folder.notices)


def test_wall_time_leaves_out_the_night(finished):
    folder = read.load(finished)
    total, kinds = cost.wall(folder), cost.by_kind(folder)
    assert kinds["train_step"] == pytest.approx(20 * 300 * 0.0055)
    assert sum(kinds.values()) < (total or 0.0) < sum(kinds.values()) + 60


@pytest.mark.parametrize(
    ("shown", "wanted"),
    [
        (markup.number(0.00012346), "0.0001235"),
        (markup.number(-2e-5), "\u22122e\u22125"),
        (markup.number(1234.6), "1,235"),
        (markup.number(float("nan")), "–"),
        (markup.short(999_950), "1M"),
        (markup.short(1_278_592), "1.28M"),
        (markup.percent(0.1234, 1), "12.3\u202f%"),
        (markup.percent(0.0001, 1), "<\u202f0.1\u202f%"),
        (markup.duration(59.9), "1 min 00 s"),
        (markup.duration(3 * 3600 + 59), "3 h 00 min"),
        (markup.moment(0), "1970-01-01 00:00 UTC"),
    ],
)
def test_numbers_read_well(shown, wanted):
    assert shown == wanted


def test_the_page_replaces_the_old_one_in_one_move(finished):
    first = report.write(finished)
    assert report.write(finished) == first == finished / "report.html"
    assert not [path for path in finished.iterdir() if path.name.startswith(".")]


def test_command_line(finished, tmp_path):
    run = lambda *a: subprocess.run(
        [sys.executable, "-m", "jaxlm.report", *map(str, a)], capture_output=True, text=True
    )
    done = run(finished)
    assert done.returncode == 0
    assert done.stdout.strip() == str(finished / "report.html")
    for folder in (tmp_path, tmp_path / "none"):
        failed = run(folder)
        assert failed.returncode == 1
        assert re.fullmatch(r"error: .*--config\.workdir names\.\n", failed.stderr)


def preferences(folder):
    """A run of preferences, as `make` leaves one of texts."""
    make(folder, 200)
    lines = lambda name: [json.loads(x) for x in (folder / name).read_text().splitlines()]
    metrics, evals = lines("metrics.jsonl"), lines("evals.jsonl")
    for row in metrics:
        row |= {"dpo/accuracy": 0.5 + row["step"] / 500, "dpo/margin": row["step"] / 100}
        row |= {"dpo/reward_chosen": 1.0, "dpo/reward_rejected": -1.0, "dpo/length_chosen": 9.0}
        row |= {"dpo/logprob_chosen": -3.0, "dpo/logprob_rejected": None, "dpo/other": 4.0}
        row |= {"dpo/entropy": 1.5, "dpo/kl_reference": 0.1, "dpo/kl_initial": 0.2}
        row |= {"dpo/log_ratio_chosen": 1.0, "dpo/log_ratio_rejected": -1.0}
        del row["bits_per_char"]
    for row in evals:
        for key in [key for key in row if "/" in key]:
            del row[key]
        row |= {"loss/likes": 0.4, "dpo/accuracy/likes": 0.875, "dpo/margin/likes": 2.5}
    results = json.loads((folder / "results.json").read_text())
    results |= {"bits_per_char": {}, "compressors": {}, "documents": {}, "passages": []}
    results["samples"] = []
    run = json.loads((folder / "run.json").read_text())
    run["data_card"]["sources"] = {"likes": {"format": "pairs", "documents": 3, "useless": {}}}
    for name, rows in (("metrics.jsonl", metrics), ("evals.jsonl", evals)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "run.json").write_text(json.dumps(run))


def test_what_a_source_left_out_is_said_in_words(tmp_path):
    preferences(tmp_path)
    _, page = write(tmp_path)
    assert "nothing to learn from" not in page.text
    run = json.loads((tmp_path / "run.json").read_text())
    card = {"useless": {}, "malformed_because": {"no JSON": 1200, "no text": 1}}
    run["data_card"]["sources"] |= {"a": card, "b": {"useless": {"empty response": 1}}}
    (tmp_path / "run.json").write_text(json.dumps(run))
    _, page = write(tmp_path)
    assert re.search(r"nothing to learn from\s+–\s+–\s+1 empty response", page.text)
    assert re.search(r"why malformed\s+–\s+1,200 no JSON, 1 no text\s+–", page.text)


def test_preferences_have_charts_of_their_own(tmp_path):
    preferences(tmp_path)
    _, page = write(tmp_path)
    titles = [a["aria-label"] for t, a in page.elements if t == "svg" and "aria-label" in a]
    titled = ("Accuracy", "Margin", "Rewards", "Log-probability", "Log-ratio to the reference")
    for title in (*titled, "KL divergence", "Entropy", "Length"):
        assert any(label.startswith(f"{title}:") for label in titles), title
    assert re.search(r"held-out likes: accuracy\s+87\.5", page.text)
    assert "Every other metric" in page.text
    assert any("other" in label for label in titles)
    assert sum(label.startswith("Accuracy") for label in titles) == 1
    assert "Bits per character:" not in page.text


def test_one_evaluation_is_a_dot_though_its_line_is_dashed():
    one, two = (chart.Line("held-out", np.arange(n), np.ones(n), "s0", "6 4") for n in (1, 2))
    assert 'class="dots s0"' in chart.chart("Accuracy", "share", [one])
    assert 'class="dots s0"' not in chart.chart("Accuracy", "share", [two])


def test_an_evaluation_of_averaged_params_says_so(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "evaluations").mkdir()
    files = {"params": "ema"}, {"params": "params", "step": 1150}, {"params": "ema", "step": 20}
    for name, more in zip("abcd", ({}, *files), strict=True):
        found = {"compression": {"notes": {"bits_per_character": 1.0}}} | more
        (tmp_path / "evaluations" / f"compression_{name}.json").write_text(json.dumps(found))
    words = Page(str(tasks.finished(read.load(tmp_path)))).words
    assert [word for word in words if word.startswith("compression_")] == [
        "compression_d, step 20, of ema",
        "compression_c, step 1,150",
        "compression_b, of ema",
    ]

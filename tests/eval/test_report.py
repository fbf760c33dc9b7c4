"""The report of a suite: one page that loads nothing, with the numbers of results.json, whatever methods are called."""

import copy
import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from kvshrink.cli.report import report as command
from kvshrink.errors import EvalError
from kvshrink.eval import report
from kvshrink.eval.report import markdown, results
from kvshrink.eval.report.notes import holm
from kvshrink.eval.report.old_keys import renamed
from kvshrink.eval.report.page import _best
from kvshrink.eval.report.standings import pooled, standings
from tests.eval import synthetic_results as synthetic

NASTY = '<b>x & "y"'
VOID = {"meta", "br", "wbr", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Tables as {caption: rows}, a row as [(text, data-value)]; ids; what would be loaded; whether tags close."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.ids, self.loads, self.tags, self.open, self.text = {}, [], [], [], [], ""
        self.rows = self.cell = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.loads += [(tag, k, v) for k, v in attrs.items() if k in ("src", "href", "xlink:href", "srcset", "data")]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tbody":
            self.rows = self.rows if self.rows is not None else []
        if tag == "tr" and self.rows is not None:
            self.rows.append([])
        if tag in ("td", "th") and self.rows is not None:
            self.cell = [("", attrs.get("data-value"))]
            self.rows[-1].append(self.cell)
        if tag == "caption":
            self.caption = ""

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"{tag} closes what is not open"
        if tag in ("td", "th"):
            self.cell = None
        if tag == "table":
            self.tables[self.caption] = [[cell[0] for cell in row] for row in self.rows or []]
            self.rows = None

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text += data
        if "caption" in self.open:
            self.caption += data
        if self.cell is not None:
            self.cell[0] = (self.cell[0][0] + data, self.cell[0][1])


def write(folder, data):
    folder.mkdir(exist_ok=True)
    (folder / "results.json").write_text(json.dumps(data))
    return folder


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """(results, folder, page) of a whole run."""
    data = synthetic.results()
    folder = write(tmp_path_factory.mktemp("full"), data)
    return data, folder, Page(report.build(folder).read_text())


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """Few tasks, two modes, and names that would break a page."""
    data = synthetic.results(modes=("agnostic", "multi_turn"), tasks=("passkey", "ruler/cwe"))
    text = json.dumps(data).replace("rtn", json.dumps(NASTY)[1:-1]).replace("ruler/cwe", "<i>cwe$_{2}$")
    data = json.loads(text)
    data["memory"], data["layers"] = [], []
    data["failures"].append({"method": NASTY, "task": "t", "length": 7, "error": "</table><script>alert(1)</script>"})
    data["grid"] += [e | {"task": f"t{i}"} for i in range(3) for e in data["grid"]]
    folder = write(tmp_path_factory.mktemp("odd"), data)
    return data, folder, Page(report.build(folder).read_text())


def test_it_writes_a_page_a_leaderboard_and_every_figure_twice(full):
    _, folder, page = full
    drawn = {p.stem for p in folder.glob("*.svg")}
    assert drawn == {p.stem for p in folder.glob("*.png")}
    names = {"mean", "accuracy", "length", "depth-agnostic-needle", "kl", "kl-2", "distance", "memory", "layers"}
    assert drawn == names
    assert page.tags.count("svg") == len(names)
    assert (folder / "leaderboard.md").read_text() == report.leaderboard(full[0])
    assert not list(folder.glob(".*part")), "temporary files are gone"


def test_the_page_loads_nothing_and_its_ids_are_unique(full, odd):
    for _, _, page in (full, odd):
        outside = [load for load in page.loads if not load[2].startswith("#")]
        assert outside == []
        assert len(page.ids) == len(set(page.ids))
        assert {v[1:] for _, _, v in page.loads} <= set(page.ids), "every link goes to something on the page"
        assert page.open == [], "every tag is closed"


def test_style_and_figures_refer_to_nothing_outside(full):
    text = (full[1] / "report.html").read_text()
    assert "@import" not in text
    assert "http" not in text.replace("https", "http").split("<body>")[0]
    assert {m for m in re.findall(r"url\((.)", text)} == {"#"}
    for used in set(re.findall(r"url\(#([^)]*)\)", text)):
        assert used in full[2].ids


def test_figures_follow_the_theme(full):
    text = (full[1] / "report.html").read_text()
    inside = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.S))
    assert "currentColor" in inside
    assert "var(--paper)" in inside
    assert "#11161c" not in inside
    assert "#fefefd" not in inside
    assert "<text" in inside, "text stays text"
    used = set(re.findall(r"var\(--(\w+)\)", text))
    assert used <= set(re.findall(r"--(\w+):", text)), "every colour is defined"


def test_the_leaderboard_has_the_numbers_of_the_results(full):
    data, _, page = full
    rows = {row[0][1]: row for row in page.tables["Leaderboard, agnostic"] if len(row) > 1}
    assert set(rows) == {e["method"] for e in data["lines"]}
    zeros = {(e["task"], e["length"]): e["delta_high"] for e in data["lines"] if e["series"] == "zeros"}
    for method, row in rows.items():
        lines = [e for e in data["lines"] if e["method"] == method and zeros[e["task"], e["length"]] < 0]
        means = {t: [e for e in lines if e["task"] == t] for t in {e["task"] for e in lines}}
        mean = sum(sum(e["score"] for e in g) / len(g) for g in means.values()) / len(means)
        assert float(row[2][1]) == pytest.approx(mean, abs=1e-9)
        assert row[2][0].startswith(f"{mean:.2f}[")
        kl = [e for e in data["fidelity"] if e["method"] == method and e["length"] == 4000]
        assert [float(row[i][1]) for i in (5, 6, 7) if row[i][1]] == [
            pytest.approx(e[k]) for e in kl for k in ("kl_mean", "kl_p99", "top1")
        ]
    by_method = {s.method: s for s in standings(data)}
    difference = by_method["rtn @0.1"].mean.score - by_method["rtn @0.1"].full
    assert float(rows["rtn @0.1"][4][1]) == pytest.approx(difference)
    could = sum(high < 0 for high in zeros.values())
    assert f"{could - 1} of {could} lines" in rows["rtn @0.1"][0][0]
    assert "budget not reached" in rows["rtn @0.06"][0][0]
    assert [rows["streaming_llm @0.1"][8], rows["full"][3]] == [("-", None)] * 2, "what is not known is a dash"


def test_a_task_that_the_model_cannot_do_is_shown_and_not_averaged(full, tmp_path):
    data = copy.deepcopy(full[0])
    task = synthetic.TASKS[0]
    before = {s.method: s.mean.score for s in standings(data)}
    for line in data["lines"]:
        if line["task"] == task:
            line["score"] = 0.0 if line["series"] in ("full", "zeros") else 1.0
            if line["series"] == "zeros":
                line["delta"] = line["delta_low"] = line["delta_high"] = 0.0
    after = {s.method: s.mean.score for s in standings(data)}
    others = copy.deepcopy(full[0])
    others["lines"] = [e for e in others["lines"] if e["task"] != task]
    assert after == {s.method: s.mean.score for s in standings(others)} != before
    write(tmp_path, data)
    page = Page(report.build(tmp_path).read_text())
    assert any(caption.startswith(f"{task}, agnostic") for caption in page.tables)
    (length, *_) = {e["length"] for e in data["lines"] if e["task"] == task}
    assert f"{task} {length} agnostic" in (tmp_path / "report.html").read_text()
    assert "that the model can do" in (tmp_path / "report.html").read_text()
    # where it can do none, there is no mean, and it is said
    for line in data["lines"]:
        if line["series"] == "zeros":
            line["delta_high"] = 0.0
    assert standings(data) == []
    assert "so there is no mean" in markdown.leaderboard(data)


def test_every_line_is_in_its_task_s_table_and_in_the_matrix(full):
    data, _, page = full
    for task in synthetic.TASKS:
        (caption,) = [c for c in page.tables if c.startswith(f"{task}, agnostic: 10 cases a line")]
        rows = [row for row in page.tables[caption] if len(row) > 1]
        lines = [e for e in data["lines"] if e["task"] == task]
        assert len(rows) == len(lines)
        for row, e in zip(rows, lines, strict=True):
            expected = [e["method"], e["byte_ratio"], e["score"], e["delta"], e["lost"], e["won"], e["p"]]
            found = [row[0][1], *(None if v is None else float(v) for _, v in row[1:7])]
            assert found == [pytest.approx(v) if isinstance(v, float) else v for v in expected]
            if e["delta"] is not None:
                assert f"[{e['delta_low']:+.2f}, {e['delta_high']:+.2f}]" in row[3][0]
            assert f"[{e['low']:.2f}, {e['high']:.2f}]" in row[2][0]
    matrix = page.tables["Scores by task and method, agnostic"]
    shown = [float(v) for row in matrix for _, v in row[2:] if v is not None]
    assert sorted(shown) == sorted(e["score"] for e in data["lines"])
    assert ("-", None) in [cell for row in matrix for cell in row], "a failure leaves a gap"


def test_fidelity_memory_and_layers_have_every_row(full):
    data, _, page = full
    tables = {n: [t for c, t in page.tables.items() if c.startswith(n)] for n in ("decode", "Bytes", "Relative")}
    counts = {n: sum(len(row) > 1 for table in found for row in table) for n, found in tables.items()}
    assert counts == {"decode": len(data["fidelity"]), "Bytes": len(data["memory"]), "Relative": len(data["layers"])}
    rows = [row for row in tables["Bytes"][0] if len(row) > 1]
    assert {float(row[3][1]) for row in rows} == {e["held"] for e in data["memory"]}
    bits = {None if row[2][1] is None else round(float(row[2][1]), 6) for row in rows}
    assert bits == {round(e["bits"], 6) if "bits" in e else None for e in data["memory"]}


def test_settings_failures_and_notes_are_there(full):
    data, _, page = full
    settings = data["settings"]
    assert settings["command"] in page.text
    for value in (*settings["versions"].values(), settings["fingerprint"], settings["date"], "300000"):
        assert value in page.text
    failed = page.tables["What failed, and why"]
    assert [row[0][0] for row in failed] == [f["method"] for f in data["failures"]]
    assert all(row[3][0] == "needs 2 more GiB." for row in failed)
    assert page.tables["Tasks that were left out at a length"][0][2][0] == "2000 tokens hold no topic."
    p = [e["p"] for e in data["lines"] if e["p"] is not None and e["series"] != "zeros"]
    assert f"{len(p)} exact McNemar tests" in page.text
    assert f"{sum(v < 0.05 for v in p)} have p < 0.05, {holm(p)} still" in page.text
    assert "rtn @0.06: the method has no setting at that size" in page.text


def test_names_are_escaped_everywhere(odd):
    data, folder, page = odd
    text = (folder / "report.html").read_text()
    assert "<b>x" not in text
    assert "<i>cwe" not in text
    assert "<script>alert" not in text
    assert page.tags.count("script") == 1
    for method in {e["method"] for e in data["lines"]}:
        assert any(method in row[0][0] for row in page.tables["Leaderboard, agnostic"])
        assert method in page.text
    assert "</table><script>alert(1)</script>" in page.text
    assert "<i>cwe$_{2}$" in page.text
    board = report.leaderboard(data)
    assert "&lt;b&gt;x" in board
    assert "<b>x" not in board


def test_two_modes_have_tables_and_figures_each_and_many_depth_tasks_are_pooled(odd):
    _, folder, page = odd
    assert {"Leaderboard, agnostic", "Leaderboard, multi_turn"} <= set(page.tables)
    drawn = {p.stem for p in folder.glob("*.svg")}
    assert {"mean", "mean-multi_turn", "accuracy", "accuracy-multi_turn", "depth-agnostic"} <= drawn
    assert len([name for name in drawn if name.startswith("depth")]) == 1
    assert "several questions follow one another" in page.text


def test_building_again_changes_nothing(tmp_path):
    data = synthetic.results(tasks=("copy",)) | {"grid": [], "layers": [], "memory": []}
    folder = write(tmp_path / "run", data)
    report.build(folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    report.build(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert json.loads((folder / "results.json").read_text()) == data


def test_without_anything_measured_every_section_says_so(tmp_path):
    folder = write(tmp_path / "empty", synthetic.empty())
    page = Page(report.build(folder).read_text())
    assert page.tags.count("svg") == 0
    for sentence in ("No task was measured", "Fidelity was not measured", "Memory was not measured", "Nothing failed"):
        assert sentence in page.text
    assert "No task was measured." in report.leaderboard(synthetic.empty())


def test_lists_that_are_missing_are_empty_and_nulls_are_dashes(tmp_path):
    data = synthetic.results(tasks=("passkey",))
    for name in ("grid", "layers", "memory", "skipped", "failures"):
        del data[name]
    for e in data["lines"] + data["fidelity"]:
        if e["series"] == "rtn":
            keep = ("task", "mode", "length", "method", "series", "target", "cases", "chunk", "documents", "positions")
            e |= {k: None for k in e if k not in keep}
    page = Page(report.build(write(tmp_path / "nulls", data)).read_text())
    rows = [row for c, t in page.tables.items() if "decode" in c for row in t if row[0][1] == "rtn @0.1"]
    assert rows
    assert {cell for row in rows for cell in row[1:]} == {("-", None)}
    assert not any(row[0][1] == "rtn @0.1" for row in page.tables["Leaderboard, agnostic"])


def test_a_failed_build_leaves_the_old_files(tmp_path, monkeypatch):
    folder = write(tmp_path / "run", synthetic.empty())
    report.build(folder)
    before = (folder / "report.html").read_bytes()
    (folder / "results.json").write_text(json.dumps(synthetic.empty() | {"settings": {"model": "other"}}))
    monkeypatch.setattr(report, "leaderboard", lambda results: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        report.build(folder)
    assert (folder / "report.html").read_bytes() == before


def test_the_mean_s_interval_is_that_of_independent_parts():
    def line(score, half):
        return {"score": score, "low": score - half, "high": score + 2 * half, "byte_ratio": 0.1}

    one = pooled([[line(0.5, 0.1)]])
    assert (one.low, one.high) == (pytest.approx(0.4), pytest.approx(0.7))
    four = pooled([[line(0.5, 0.1)]] * 4)
    assert (four.low, four.high) == (pytest.approx(0.45), pytest.approx(0.6)), "half as wide with four times the tasks"
    uneven = pooled([[line(0.2, 0.1)], [line(0.6, 0.1), line(1.0, 0.1)]])
    assert uneven.score == pytest.approx(0.5), "a task counts once, whatever its lengths"
    assert pooled([[line(0.5, 0.1) | {"low": None}]]).low is None
    assert pooled([[line(0.5, 0.1) | {"score": None}]]) is None


def test_standings_compare_with_the_full_cache_on_the_same_lines():
    data = synthetic.results(tasks=("passkey", "ruler/cwe", "copy"))
    found = {s.method: s for s in standings(data)}
    lost = found["rtn @0.2"]
    assert (lost.lines, lost.all_lines) == (5, 6)
    full = {(e["task"], e["length"]): e["score"] for e in data["lines"] if e["series"] == "full"}
    cwe = full["ruler/cwe", 2000]
    others = [(full[t, 2000] + full[t, 4000]) / 2 for t in ("passkey", "copy")]
    assert lost.full == pytest.approx((cwe + sum(others)) / 3), "the length that failed is left out of both"
    assert lost.delta == pytest.approx(lost.mean.score - lost.full)
    assert lost.delta_low <= lost.delta <= lost.delta_high
    assert found["full"].delta_low is None
    alone = {s.method: s for s in standings(synthetic.results(tasks=("copy",)))}
    assert alone["rtn @0.2"].delta_low is None, "one task says nothing about tasks"
    order = [(s.lines < s.all_lines, -s.mean.score) for s in standings(data) if s.target == 0.1]
    assert order == sorted(order), "the highest first, those with lines missing after them"


def test_a_method_that_has_only_its_best_lines_left_is_not_the_best():
    data = synthetic.results()
    own = [e for e in data["lines"] if e["method"] == "rtn @0.2"]
    data["lines"] = [e for e in data["lines"] if e["method"] != "rtn @0.2" or e is own[0]]
    own[0]["score"] = 1.0
    board = standings(data)
    assert max(board, key=lambda s: s.mean.score * (s.series not in ("full", "zeros"))).method == "rtn @0.2"
    assert not any(b["method"] == "rtn @0.2" for b in _best(board))


def test_bytes_that_miss_the_budget_on_both_sides_do_not_reach_it():
    line = {"target": 0.1, "byte_ratio": 0.06}
    assert not results.reached([line, {**line, "byte_ratio": 0.14}])
    assert results.reached([{**line, "byte_ratio": 0.098}, {**line, "byte_ratio": 0.103}])
    assert results.reached([{**line, "target": None}])


def test_without_its_zeros_line_a_task_is_not_called_impossible():
    data = synthetic.results()
    task = synthetic.TASKS[0]
    data["lines"] = [e for e in data["lines"] if e["task"] != task or e["series"] != "zeros"]
    assert any(e["task"] == task for e in results.telling(data, "agnostic"))


def test_the_leaderboard_in_the_docs_is_that_of_the_committed_results(tmp_path):
    docs = Path(__file__).parents[2] / "docs"
    copied = tmp_path / "leaderboard.md"
    copied.write_text((docs / "leaderboard.md").read_text())
    report.write_leaderboard(docs / "results" / "suite" / "results.json", copied)
    assert copied.read_text() == (docs / "leaderboard.md").read_text()


def test_holm_counts_like_its_paper():
    assert holm([0.01, 0.04, 0.03, 0.005]) == 2
    assert holm([0.01, 0.02, 0.03, 0.04]) == 1
    assert (holm([]), holm([0.2])) == (0, 0)


def test_the_leaderboard_goes_between_its_marks_and_again_changes_nothing(full, tmp_path):
    data, folder, _ = full
    page = tmp_path / "leaderboard.md"
    page.write_text(f"# Before\n\n{markdown.BEGIN}\nold\n{markdown.END}\n\nafter | text\n")
    report.write_leaderboard(folder / "results.json", page)
    first = page.read_text()
    assert report.leaderboard(data) in first
    assert "old" not in first
    assert first.startswith("# Before\n\n")
    assert first.endswith("\n\nafter | text\n")
    report.write_leaderboard(folder / "results.json", page)
    assert page.read_text() == first


def test_the_leaderboard_names_every_method_with_its_numbers(full):
    board = report.leaderboard(full[0])
    assert board.count("### ") == 3
    for s in standings(full[0]):
        (row, *_) = [r for r in board.splitlines() if r.startswith(f"| {s.method.replace('_', chr(92) + '_')} ")]
        assert f"{s.mean.score:.2f} [{s.mean.low:.2f}, {s.mean.high:.2f}]" in row
    head, rows = report.overview(full[0])
    assert {len(row) for row in rows} == {len(head)}
    assert [row[0] for row in rows] == ["agnostic"] * len(standings(full[0]))


@pytest.mark.parametrize(
    "text", ["no marks", f"{markdown.END} {markdown.BEGIN}", f"{markdown.BEGIN * 2}{markdown.END}"]
)
def test_a_page_without_the_marks_is_refused(full, tmp_path, text):
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(EvalError, match="marks once each"):
        report.write_leaderboard(full[1] / "results.json", page)
    assert page.read_text() == text


def _spoiled(change):
    data = copy.deepcopy(synthetic.results(tasks=("copy",)))
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (None, "is no folder"),
        ({}, "holds no results.json"),
        ({"outcomes.jsonl": "{}"}, "was interrupted. Run its command again"),
        ({"results.json": "{"}, "cannot be read"),
        ({"results.json": "[]"}, "not an object"),
        ({"results.json": '{"results": []}'}, "has the format None, not 'kvshrink results 1'"),
        ({"results.json": _spoiled(lambda d: d.pop("settings"))}, "has no settings"),
        ({"results.json": _spoiled(lambda d: d["lines"][3].pop("score"))}, r"lines[3] has no 'score'"),
    ],
)
def test_a_folder_without_results_is_refused_in_one_line(tmp_path, files, reason):
    folder = tmp_path / "run"
    if files is not None:
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
    with pytest.raises(EvalError, match=re.escape(reason)) as error:
        report.build(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [[1], {}, [[]], {"a": []}], ids=repr)
def test_a_field_of_another_type_is_refused(tmp_path, value):
    whole = synthetic.results(tasks=("needle",))
    whole = {k: v[:2] if isinstance(v, list) else v for k, v in whole.items()}
    for name, names in results.FIELDS.items():
        for field in names:
            data = whole | {name: [*whole[name][:-1], {**whole[name][-1], field: value}]}
            (tmp_path / "results.json").write_text(json.dumps(data))
            with pytest.raises(EvalError, match=rf"^[^\n]+: {name}\[\d\] has {field}=[^\n]+\. It is edited\."):
                results.read(tmp_path)


def test_numbers_that_json_does_not_have_are_shown(tmp_path):
    data = synthetic.results(tasks=("needle",))
    data["lines"][3]["score"] = data["fidelity"][0]["kl_mean"] = math.nan
    (tmp_path / "results.json").write_text(json.dumps(data))
    assert "nan" in report.leaderboard(results.read(tmp_path))


@pytest.mark.parametrize("entries", [3, "abc", {"a": 1}, [3], [[]], None])
def test_lists_of_anything_else_are_refused(tmp_path, entries):
    (tmp_path / "results.json").write_text(json.dumps(synthetic.empty() | {"lines": entries}))
    with pytest.raises(EvalError, match=r"lines is no list of objects\. It is edited\. Run"):
        results.read(tmp_path)


def test_the_command_builds_and_fills_a_page(tmp_path):
    folder = write(tmp_path / "run", synthetic.empty())
    page = tmp_path / "page.md"
    page.write_text(f"{markdown.BEGIN}{markdown.END}")
    app = typer.Typer()
    app.command()(command)
    done = CliRunner().invoke(app, [str(folder), "--leaderboard", str(page), "--json"])
    assert done.exit_code == 0
    assert json.loads(done.stdout.splitlines()[-1]) == {"report": str(folder / "report.html"), "leaderboard": str(page)}
    assert (folder / "report.html").is_file()
    assert "No task was measured." in page.read_text()
    refused = CliRunner().invoke(app, [str(tmp_path)])
    assert isinstance(refused.exception, EvalError)


@pytest.mark.parametrize(("module", "reason"), [("jinja2", "a report needs jinja2"), ("matplotlib", "plots need matp")])
def test_what_is_not_installed_is_named_with_the_command(tmp_path, monkeypatch, module, reason):
    folder = write(tmp_path / "run", synthetic.empty())
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(EvalError, match=rf"{reason}.*pip install 'kvshrink\[eval\]'"):
        report.build(folder)


def test_fields_are_those_of_the_format():
    data = synthetic.results(tasks=("copy",))
    for name, fields in results.FIELDS.items():
        assert set(fields) <= set(data[name][0]), name


def test_results_of_before_the_byte_ratio_had_its_name_are_read():
    old = {"lines": [{"kept": 0.1, "score": 1}, {"kept": None}], "fit": {"kept": "trained"}, "rows": [{"next_kept": 2}]}
    assert renamed(old) == {
        "lines": [{"byte_ratio": 0.1, "score": 1}, {"byte_ratio": None}],
        "fit": {"kept": "trained"},
        "rows": [{"next_byte_ratio": 2}],
    }

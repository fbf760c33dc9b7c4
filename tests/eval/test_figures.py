"""Figures: what they draw, what they leave out, and how they are put into a page."""

import re

import pytest

from kvshrink.eval.report import figures, figures_cache, plots, style
from kvshrink.eval.report.results import fidelity_groups, series
from kvshrink.eval.report.standings import standings
from tests.eval import synthetic_results as synthetic

TASKS = ("passkey", "ruler/cwe", "copy")


@pytest.fixture(autouse=True)
def drawing():
    with plots.pyplot().rc_context(style.RC):
        yield
    plots.pyplot().close("all")


@pytest.fixture(scope="module")
def data():
    return synthetic.results(tasks=TASKS)


@pytest.fixture
def look(data):
    return style.styles(series(data))


def curve(axis, look, name):
    """Points of a series' line: [(x, y)]."""
    lines = [ln for ln in axis.lines if ln.get_color() == look[name].colour and len(ln.get_xdata()) > 1]
    return [(x, y) for x, y in zip(*lines[0].get_data(), strict=True)]


def test_the_mean_s_points_are_the_standings(data, look):
    board = standings(data)
    axis = figures.mean(board, look).axes[0]
    for name in synthetic.SERIES:
        own = sorted((100 * s.mean.byte_ratio, s.mean.score) for s in board if s.series == name)
        assert curve(axis, look, name) == [pytest.approx(p) for p in own]
    levels = {line.get_ydata()[0] for line in axis.lines if line.get_linestyle() in ("--", ":")}
    assert levels == {s.mean.score for s in board if s.target is None}
    hollow = [line for line in axis.lines if line.get_markerfacecolor() == style.PAPER]
    missed = next(s for s in board if s.method == "rtn @0.06")
    assert [list(line.get_xdata()) for line in hollow] == [[pytest.approx(100 * missed.mean.byte_ratio)]]


def test_accuracy_has_a_panel_per_task_and_one_for_the_mean(data, look):
    axes = [a for a in figures.accuracy(data, look, "agnostic").axes if a.axison]
    assert [a.get_title(loc="left") for a in axes] == ["mean over tasks", *TASKS]
    lines = [e for e in data["lines"] if e["task"] == "copy" and e["method"] == "rtn @0.2"]
    points = curve(axes[3], look, "rtn")
    assert points[-1][1] == pytest.approx(sum(e["score"] for e in lines) / 2)
    bars = [seg for c in axes[3].collections for seg in c.get_segments()]
    assert len(bars) == len(synthetic.SERIES) * len(synthetic.TARGETS), "an interval for every point"
    assert figures.accuracy(synthetic.empty(), look, "agnostic") is None
    alone = data | {"lines": [e for e in data["lines"] if e["task"] == "copy"]}
    assert [a.get_title(loc="left") for a in figures.accuracy(alone, look, "agnostic").axes] == ["copy"]


def test_length_uses_only_tasks_that_have_every_length(data, look):
    axes = figures.length(data, look, "agnostic").axes
    assert [a.get_title(loc="left") for a in axes] == ["20 % of the bytes", "10 % of the bytes", "6 % of the bytes"]
    assert axes[0].get_ylabel() == "mean score over 3 tasks"
    one = [e for e in data["lines"] if e["length"] == 2000]
    assert figures.length(data | {"lines": one}, look, "agnostic") is None, "one length is no curve"
    part = [e for e in data["lines"] if (e["task"], e["length"]) != ("copy", 4000)]
    assert figures.length(data | {"lines": part}, look, "agnostic").axes[0].get_ylabel().endswith("2 tasks")


def test_the_heatmap_has_a_row_per_method_and_the_asked_colours(data):
    axes = [a for a in figures.heatmap(data, "agnostic", ["needle"]).axes if a.axison]
    titles = [a.get_title(loc="left") for a in axes]
    assert titles[:2] == ["full cache", "context zeroed"]
    assert titles[2:] == [f"{s} @{t:g}" for s in synthetic.SERIES for t in synthetic.TARGETS]
    mesh = axes[0].collections[0]
    assert {(a.collections[0].norm.vmin, a.collections[0].norm.vmax) for a in axes} == {(0, 1)}
    ends = [tuple(round(255 * c) for c in mesh.cmap(x)[:3]) for x in (0.0, 1.0)]
    assert ends == [(0xF0, 0x49, 0x6E), (0x0C, 0xD7, 0x9F)]
    cells = [e for e in data["grid"] if e["method"] == "streaming_llm @0.1"]
    drawn = axes[titles.index("streaming_llm @0.1")].collections[0].get_array()
    for e in cells:
        row, column = int(4 * e["depth"]), (1000, 2000, 4000).index(e["length"])
        assert float(drawn[row][column]) == e["score"]
    assert axes[0].yaxis_inverted(), "the start of the context is on top"
    assert figures.heatmap(data, "aware", ["needle"]) is None


def test_depths_that_no_two_samples_share_go_into_eighths(data):
    many = [e | {"depth": e["depth"] * (0.96 + i / 1000)} for i, e in enumerate(data["grid"])]
    axis = figures.heatmap(data | {"grid": many}, "agnostic", ["needle"]).axes[0]
    assert len(axis.get_yticks()) <= 9


def test_a_cell_is_the_mean_over_tasks_of_means_over_cases():
    cells = [
        {"task": "a", "depth": 0.0, "length": 1, "score": 1.0, "cases": 3},
        {"task": "a", "depth": 0.01, "length": 1, "score": 0.0, "cases": 1},
        {"task": "b", "depth": 0.0, "length": 1, "score": 0.25, "cases": 1},
        {"task": "b", "depth": 0.5, "length": 1, "score": None, "cases": 1},
    ]
    assert figures._means(cells, lambda e: round(8 * e["depth"]) / 8) == {(0.0, 1): 0.5}


def test_divergence_is_drawn_on_log_axes_with_its_front(data, look):
    group = fidelity_groups(data)[0]
    assert {e["length"] for e in group} == {4000}, "the longest prefix comes first"
    axis = figures_cache.divergence(group, look, {"rtn @0.06"}).axes[0]
    assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")
    own = sorted((100 * e["byte_ratio"], e["kl_mean"]) for e in group if e["series"] == "rtn")
    assert curve(axis, look, "rtn") == [pytest.approx(p) for p in own]
    assert len([ln for ln in axis.lines if ln.get_markerfacecolor() == style.PAPER]) == 1
    exact = [e | {"kl_mean": 0.0, "kl_low": 0.0, "kl_high": 0.0} for e in group]
    assert figures_cache.divergence(exact, look, set()) is not None, "no loss at all can be drawn"
    assert figures_cache.divergence([e | {"kl_mean": None} for e in group], look, set()) is None


def test_the_front_leaves_out_what_another_point_beats():
    points = [(10.0, 0.5), (20.0, 0.1), (20.0, 0.6), (40.0, 0.2), (50.0, 0.05)]
    assert figures_cache.pareto(points) == [(10.0, 0.5), (20.0, 0.1), (50.0, 0.05)]
    assert figures_cache.pareto([(9.9, 3.0), (10.0, 0.1)]) == [(10.0, 0.1)], "as good as the same bytes"


def test_memory_draws_what_is_held_and_the_peak_on_top(data, look):
    axis = figures_cache.memory(data, look).axes[1]
    rows = sorted((e["length"], e["held"], e["peak"]) for e in data["memory"] if e["method"] == "rtn @0.1")
    lines = [ln for ln in axis.lines if ln.get_color() == look["rtn"].colour]
    assert [list(ln.get_ydata()) for ln in lines] == [[h for _, h, _ in rows], [h + p for _, h, p in rows]]
    assert figures_cache.memory(synthetic.empty(), look) is None
    unknown = [e | {"peak": None} for e in data["memory"]]
    assert figures_cache.memory(data | {"memory": unknown}, look) is not None


def test_layers_draw_the_longest_context_and_skip_what_was_not_measured(data, look):
    shorter = [e | {"length": 10, "output_error": 9.0} for e in data["layers"]]
    axes = figures_cache.layers(data | {"layers": data["layers"] + shorter}, look).axes
    assert len(axes) == 4 * len(synthetic.TARGETS)
    assert max(y for a in axes for ln in a.lines for y in ln.get_ydata()) < 9
    assert not any(ln.get_color() == look["streaming_llm"].colour for ln in axes[0].lines), "has no key error"
    no_keys = [e | {"key_error": None} for e in data["layers"]]
    assert len(figures_cache.layers(data | {"layers": no_keys}, look).axes) == 3 * len(synthetic.TARGETS)
    assert figures_cache.layers(synthetic.empty(), look) is None


def test_distance_has_a_curve_per_method(data, look):
    axes = figures_cache.distance(fidelity_groups(data)[0], look).axes
    assert [len(a.lines) for a in axes] == [3, 3, 3]
    assert figures_cache.distance([], look) is None


def test_many_series_are_told_apart_and_keep_their_looks():
    names = [f"method {i}" for i in range(63)]
    looks = style.styles(["full", *names, "zeros"])
    assert len({(s.colour, s.mark) for s in looks.values()}) == 65
    assert style.styles(names[:5])["method 3"] == looks["method 3"]


def test_colours_stand_out_from_both_pages():
    def light(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        parts = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    for on_light, on_dark in style.PALETTE:
        assert 1.05 / (light(on_light) + 0.05) >= 3
        assert (light(on_dark) + 0.05) / (light("#14181d") + 0.05) >= 3


def test_inline_svg_has_its_own_ids_and_no_header():
    plt = plots.pyplot()
    found = []
    for name in ("a", "b"):
        figure, axis = plt.subplots()
        axis.plot([1, 2], [1, 2], "o", label="<b>&$x_1$")
        axis.legend()
        found.append(style.picture(figure, name, 'said "so" <here>'))
    first, second = (set(re.findall(r'\bid="([^"]*)"', p.inline)) for p in found)
    assert first
    assert not first & second
    assert all(i.startswith("a-") for i in first)
    links = re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', found[0].inline)
    assert {a or b for a, b in links} <= first
    svg = found[0].inline
    assert svg.startswith('<svg class="plot" role="img" aria-label="said &#34;so&#34; &lt;here&gt;" viewBox')
    assert 'style="max-width: 765px"' in svg, "460.8 points"
    for gone in ("<?xml", "<!DOCTYPE", "<metadata", "<style", "http", "<!--", "<b>"):
        assert gone not in found[0].inline
    assert "&lt;b&gt;&amp;$x_1$" in found[0].inline, "text is neither markup nor formula"
    assert found[0].png.startswith(b"\x89PNG")
    assert b"<?xml" in found[0].svg


def test_axes_show_plain_numbers():
    _, axis = plots.pyplot().subplots()
    figures.byte_axis(axis, [0.06, 0.2])
    assert [t.get_text() for t in axis.get_xticklabels()] == ["5", "7", "10", "15", "20"]
    assert [figures.short(n) for n in (500, 2000, 2048, 131072, 1500)] == ["500", "2k", "2k", "128k", "1.5k"]
    assert [figures_cache.human(n) for n in (1, 1536, 5 * 2**30)] == ["1 B", "1.5 KiB", "5 GiB"]

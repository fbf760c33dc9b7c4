"""The page: figures, tables and notes of one set of results, in one HTML file that loads nothing."""

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from kvshrink.errors import EvalError
from kvshrink.eval.report import figures, figures_cache, plots, tables
from kvshrink.eval.report.notes import OF_FULL, notes
from kvshrink.eval.report.results import budget, fidelity_groups, modes, of, reached, series, telling, unique
from kvshrink.eval.report.standings import Standing
from kvshrink.eval.report.style import PALETTE, RC, Picture, Style, picture, styles
from kvshrink.eval.run.entries import CONTROLS

HERE = Path(__file__).parent
NARROW = 5.0  # inches; a wider figure scrolls in its own box on a phone
SEPARATE = 3  # as many tasks get a depth drawing of their own; more are averaged


@dataclass(frozen=True)
class Figure:
    name: str
    caption: str
    picture: Picture
    width: str = ""


Planned = tuple[str, str, str, Callable[[], Any]]  # place, name, caption, how to draw it


def drawn(results: dict, board: Sequence[Standing]) -> dict[str, list[Figure]]:
    """All figures by the place where they stand, in the order of the page."""
    look = styles(series(results))
    plt = plots.pyplot()
    found: dict[str, list[Figure]] = {}
    with plt.rc_context(RC):
        for place, name, caption, draw in [*_of_scores(results, board, look), *_of_cache(results, look)]:
            figure = draw()
            if figure is not None:
                width = "wide" if figure.get_size_inches()[0] > NARROW else ""
                found.setdefault(place, []).append(Figure(name, caption, picture(figure, name, caption), width))
                plt.close(figure)
    return found


def _of_scores(results: dict, board: Sequence[Standing], look: Mapping[str, Style]) -> Iterator[Planned]:
    for i, mode in enumerate(modes(results)):
        # the first mode's mean is what the page opens with
        end, said, place = ("", ".", "hero") if i == 0 else (f"-{mode}", f", {mode}.", mode)
        yield place, f"mean{end}", MEAN + said, partial(figures.mean, of_mode(board, mode), look)
        yield mode, f"accuracy{end}", TASKS + said, partial(figures.accuracy, results, look, mode)
        yield mode, f"length{end}", LENGTH + said, partial(figures.length, results, look, mode)
    for mode in unique(e["mode"] for e in results["grid"]):
        tasks = unique(e["task"] for e in of(results["grid"], mode=mode))
        for names in [[t] for t in tasks] if len(tasks) <= SEPARATE else [tasks]:
            name = f"depth-{mode}-{_file(names[0])}" if len(names) == 1 else f"depth-{mode}"
            said = DEPTH.format(", ".join(names), mode)
            yield "depth", name, said, partial(figures.heatmap, results, mode, names)


def _of_cache(results: dict, look: Mapping[str, Style]) -> Iterator[Planned]:
    for i, group in enumerate(fidelity_groups(results)):
        where = f"{group[0]['mode']}, length {group[0]['length']}"
        missed = {e["method"] for e in group if not reached([e])}
        place, name = ("hero", "kl") if i == 0 else ("fidelity", f"kl-{i + 1}")
        yield place, name, KL.format(where), partial(figures_cache.divergence, group, look, missed)
        if i == 0:
            yield "fidelity", "distance", DISTANCE.format(where), partial(figures_cache.distance, group, look)
    yield "memory", "memory", MEMORY, partial(figures_cache.memory, results, look)
    yield "layers", "layers", LAYERS, partial(figures_cache.layers, results, look)


MEAN = "Mean score over tasks and lengths against bytes really held, with 95 % intervals; hollow: budget not reached"
TASKS = "Score of each task, mean over lengths, against bytes really held, with 95 % intervals; hollow as above"
LENGTH = "Mean score against the length of the context, over the tasks run at every length, with 95 % intervals"
DEPTH = "Score by depth and length: {}; {}. Red is 0, yellow .5, green 1; a cell is the mean over tasks of its samples."
KL = "KL from the full cache, {}, with 95 % intervals. Lower left is better; grey: what no other one beats."
DISTANCE = "KL by distance from the end of the compressed prefix; {}."
MEMORY = "Solid: bytes held. Dashed: with the temporaries of one decode step on top."
LAYERS = "Relative error per layer at the longest context measured, a row per budget."


def check_installed() -> None:
    """Raise EvalError unless what a page and its pictures are made with is there."""
    plots.pyplot()
    if any(importlib.util.find_spec(name) is None for name in ("jinja2", "markupsafe")):
        raise EvalError("a report needs jinja2: pip install 'kvshrink[eval]'.")


def page(results: dict, board: Sequence[Standing], found: dict[str, list[Figure]]) -> str:
    """The HTML text. board: the standings of the results; found: its figures."""
    check_installed()
    from jinja2 import Environment, FileSystemLoader
    from markupsafe import Markup

    settings = results["settings"]
    names = unique(s.mode for s in board)
    groups = fidelity_groups(results)
    shown = {
        "settings": settings,
        "count": {
            "series": len([s for s in series(results) if s not in CONTROLS]),
            "tasks": len(unique(e["task"] for e in results["lines"])),
            "telling": len({e["task"] for m in modes(results) for e in telling(results, m)}),
        },
        "facts": _facts(results),
        "byte_ratio": OF_FULL,
        "best": _best(of_mode(board, names[0])) if names else [],
        "boards": [(m, tables.leaderboard(of_mode(board, m))) for m in names],
        "modes": [_mode(results, m, found.get(m, [])) for m in modes(results)],
        "skipped": tables.skipped(results["skipped"]) if results["skipped"] else None,
        "fidelity": [tables.fidelity(group) for group in groups],
        "memory": tables.memory(results["memory"]) if results["memory"] else None,
        "layers": tables.layers(results["layers"]) if results["layers"] else None,
        "failures": tables.failures(results["failures"]) if results["failures"] else None,
        "notes": notes(results, board),
        "settings_table": tables.settings(settings),
        "figures": {place: found.get(place, []) for place in ("hero", "depth", "fidelity", "memory", "layers")},
        "styles": styles(series(results)),
        "css": Markup(_css()),
        "js": Markup((HERE / "page.js").read_text(encoding="utf-8")),
    }
    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, keep_trailing_newline=True)
    return environment.get_template("page.html.j2").render(shown)


def _mode(results: dict, mode: str, found: list[Figure]) -> dict:
    lines = of(results["lines"], mode=mode)
    names = unique(e["task"] for e in lines)
    each = [(name, tables.task(of(lines, task=name))) for name in names]
    return {"name": mode, "figures": found, "matrix": tables.matrix(lines), "tasks": each}


def _facts(results: dict) -> list[tuple[str, str]]:
    s, lines = results["settings"], results["lines"]
    listed = {
        "model": ", ".join(str(s[k]) for k in ("model", "dtype") if s.get(k)),
        "answers scored": f"{sum(e['cases'] for e in lines):,}",
        "cases a line": s.get("cases"),
        "lengths": ", ".join(figures.short(n) for n in sorted({e["length"] for e in lines if e["length"] is not None})),
        "budgets": ", ".join(f"{100 * t:g}" for t in s["byte_ratio"]) + " %" if s.get("byte_ratio") else None,
        "modes": ", ".join(modes(results)),
        "failures": str(len(results["failures"])),
        "device": f"{s.get('device') or ''}{', {} threads'.format(s['threads']) if s.get('threads') else ''}",
    }
    return [(name, str(text)) for name, text in listed.items() if text not in (None, "")]


def of_mode(board: Sequence[Standing], mode: str) -> list[Standing]:
    return [s for s in board if s.mode == mode]


def _best(board: Sequence[Standing]) -> list[dict]:
    """Per budget the method with the highest mean score among those that reached it and have all lines."""
    best = []
    for target in unique(s.target for s in board if s.series not in CONTROLS):
        own = [s for s in board if s.target == target and s.series not in CONTROLS and s.reached]
        own = [s for s in own if s.lines == s.all_lines]
        if not own:
            continue
        s = max(own, key=lambda s: s.mean.score)
        text = f"{s.mean.score:.2f}" + (f" [{s.mean.low:.2f}, {s.mean.high:.2f}]" if s.mean.low is not None else "")
        text += f", full cache {s.full:.2f}" if s.full is not None else ""
        text += f", holds {100 * s.mean.byte_ratio:.1f} %" if s.mean.byte_ratio is not None else ""
        best.append({"budget": budget(target), "method": s.method, "series": s.series, "text": text})
    return best


def _css() -> str:
    light, dark = (" ".join(f"--s{i}: {pair[k]};" for i, pair in enumerate(PALETTE)) for k in (0, 1))
    return (HERE / "page.css").read_text(encoding="utf-8").replace("LIGHT", light).replace("DARK", dark)


def _file(task: str) -> str:
    """A task's title as part of a file name and of an id."""
    return "".join(c if c.isalnum() else "_" for c in task)

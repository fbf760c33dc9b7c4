"""How figures look: colours and marks per method, and SVG that follows the page's light or dark theme."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from kvshrink.eval.run.entries import CONTROLS, FULL

# stand-ins that no series has: in the page they become the colours of its theme
INK, PAPER = "#11161c", "#fefefd"
# (on a light page, on a dark page): told apart by colour-blind readers, at least 3:1 against the page
PALETTE = (
    ("#0072b2", "#5ab3f0"),
    ("#d55e00", "#ff9552"),
    ("#008a65", "#35cfa0"),
    ("#a63a8c", "#e892cf"),
    ("#8a6d00", "#dcc04a"),
    ("#4b3fbf", "#a9a2ff"),
    ("#7a4b2a", "#d2a37f"),
)
MARKS = ("o", "s", "^", "D", "v", "P", "X", "p", "h")  # 9 marks and 7 colours: 63 pairs before one comes again
SCALE = 1.66  # pixels of a page per point of a figure, at most
RC = {
    "font.size": 8.5,
    "axes.titlesize": 8.5,
    "legend.fontsize": 8,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.13,
    "grid.linewidth": 0.6,
    "axes.grid": True,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "legend.frameon": False,
    "lines.linewidth": 1.3,
    "lines.markersize": 5,
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "kvshrink",
}


@dataclass(frozen=True)
class Style:
    """slot: number of the colour in PALETTE, -1 for ink (controls)."""

    colour: str
    mark: str
    dash: str
    slot: int


@dataclass(frozen=True)
class Picture:
    """A drawn figure: two files, and the SVG to put into a page."""

    svg: bytes
    png: bytes
    inline: Markup


def styles(series: Sequence[str]) -> dict[str, Style]:
    """By place in the list, so that a method looks the same in all figures and tables of a report."""
    found = {}
    others = [name for name in series if name not in CONTROLS]
    for i, name in enumerate(others):
        slot = i % len(PALETTE)
        found[name] = Style(PALETTE[slot][0], MARKS[i % len(MARKS)], "-", slot)
    for name in CONTROLS:
        found[name] = Style(INK, "*", "--", -1) if name == FULL else Style(INK, "x", ":", -1)
    return found


def picture(figure, name: str, label: str) -> Picture:
    """Both files and the inline form of a figure; the ids inside start with its name. Draw it within RC."""
    svg, png = io.BytesIO(), io.BytesIO()
    # without a date the same results give the same bytes
    figure.savefig(svg, format="svg", metadata={"Date": None})
    figure.set_layout_engine("none")  # laid out once is enough
    figure.savefig(png, format="png", dpi=160)
    return Picture(svg.getvalue(), png.getvalue(), inline(svg.getvalue().decode(), name, label))


def inline(svg: str, name: str, label: str) -> Markup:
    """SVG text for a page: no header, sizes or metadata, own ids, theme colours in place of the stand-ins."""
    svg = re.sub(r"\s*<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.S)
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.S)
    # matplotlib's rule is for every element, which would mean the whole page; page.css has it for figures
    svg = re.sub(r"\s*<defs>\s*<style.*?</style>\s*</defs>", "", svg, count=1, flags=re.S)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    for slot, (colour, _) in enumerate(PALETTE):
        svg = svg.replace(colour, f"var(--s{slot})")
    svg = svg.replace(INK, "currentColor").replace(PAPER, "var(--paper)")
    box = svg.split('viewBox="')[1].split('"')[0]
    # letters have one size in all figures, small or large
    size = f'viewBox="{box}" style="max-width: {SCALE * float(box.split()[2]):.0f}px"'
    head = f'<svg class="plot" role="img" aria-label="{Markup.escape(label)}" {size}>'
    return Markup(re.sub(r"<svg[^>]*>", lambda _: head, svg, count=1))

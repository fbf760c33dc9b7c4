"""ablations.md: per experiment what follows from its numbers, its table and its picture."""

from collections.abc import Mapping, Sequence
from types import ModuleType

from recipes.cskv_paper.lab import PAPER_LR, PAPER_STEPS
from recipes.cskv_paper.rows import LINES, number

LEFT_OUT = 6  # lines of what was left out, before they are counted

Table = tuple[Sequence[str], Sequence[Sequence[str]]]


def page(found: Mapping[str, dict], modules: Mapping[str, ModuleType]) -> str:
    """The whole page of some experiments' data."""
    parts = ["# Ablations", INTRODUCTION]
    for name, data in found.items():
        parts += [f"## {modules[name].TITLE}", _settings(data["settings"])]
        if data["rows"]:
            parts.append("\n".join(f"- {sentence}" for sentence in modules[name].say(data) if sentence))
            parts.append(f"![{modules[name].TITLE}]({name}.png)")
            parts += [markdown(*t) for t in tables(modules[name], data)]
        parts += _missing(data)
        parts.append(f"Numbers: [{name}.json]({name}.json)")
    return "\n\n".join(parts) + "\n"


def tables(module: ModuleType, data: dict) -> list[Table]:
    own = [module.table(data)] if hasattr(module, "table") else []
    return [scores(data), *own] if any("lines" in r for r in data["rows"]) else own


def scores(data: dict) -> Table:
    """A line per row: bytes, pooled lines, other tasks, KL."""
    others = list(dict.fromkeys(t["task"] for r in data["rows"] for t in r["tasks"] if t["task"] not in LINES))
    head = ("row", "of full cache", "lines right", *others, "KL, nats", "top-1 agreement")
    return head, [_line(r, others) for r in data["rows"]]


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ("---", *("---:" for _ in head[1:])), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def _line(row: dict, others: Sequence[str]) -> tuple[str, ...]:
    kl = row["kl"]
    by_task = {t["task"]: t for t in row["tasks"]}
    cells = [_score(row["lines"]), *(_score(by_task.get(task)) for task in others)]
    span = "" if kl is None or kl["low"] is None else f" [{kl['low']:.3g}, {kl['high']:.3g}]"
    divergence = (
        ("-", "-") if kl is None else (f"{kl['mean']:.3g}{span} ({kl['documents']})", f"{100 * kl['top1']:.1f} %")
    )
    return (row["label"], _bytes(row), *cells, *divergence)


def _bytes(row: dict) -> str:
    """Measured bytes: on lines, whose contexts are short, and on the documents of the KL."""
    if row.get("simulated"):
        return "simulated: none saved"
    found = {"lines": row["lines"], "documents": row["kl"]}
    parts = [f"{100 * x['byte_ratio']:.1f} % {name}" for name, x in found.items() if x and x["byte_ratio"] is not None]
    return ", ".join(parts) or "-"


def _score(got: dict | None) -> str:
    if not got:
        return "-"
    return f"{number(got['score'])} [{number(got['low'])}, {number(got['high'])}] ({got['cases']})"


def _settings(s: dict) -> str:
    trained = f"training {s['steps']:,} steps at lr {s['lr']:.2g} (the paper: {PAPER_STEPS:,} at {PAPER_LR:.0e})"
    return (
        f"Model `{s['model']}` in {s['dtype']}, {s['cases']} cases a task, {s['documents']} documents of {s['length']} "
        f"tokens ({s['scored']} scored), {trained}, seed {s['seed']}: `{s['command']}`"
    )


def _missing(data: dict) -> list[str]:
    parts = []
    if data["failures"]:
        failed = "; ".join(f"{x['method']} on {x['task']}: {x['error']}" for x in data["failures"])
        parts.append(f"Failed: {failed}.")
    if left := data["left_out"]:
        shown = "; ".join(f"{x['task']}: {x['reason']}" for x in left[:LEFT_OUT])
        more = f"; and {len(left) - LEFT_OUT} more in the JSON" if len(left) > LEFT_OUT else ""
        parts.append(f"Left out: {shown}{more}.")
    return parts


INTRODUCTION = (
    "The CSKV paper's tables and figures ([arXiv 2409.10593](https://arxiv.org/abs/2409.10593)) in shape, on another "
    "model: what is compared is which row is above which, not the scores. The sentences are written by the program "
    "from the numbers: *agrees* and *differs* need an exact McNemar test on the same cases below .05, or, where "
    "answers do not decide, a KL whose paired 95 % interval over documents excludes a tie (*by the KL*); else *not "
    "decided*. Every context is compressed before its question is seen. Bytes are measured, with window, sinks, scales "
    "and positions. Lines are LongEval records of 30 lines, official and generated ones together. Brackets are 95 % "
    "intervals (Wilson for answers, Student's t over documents for KL), parentheses the number of answers or documents."
    " All rows have 4 sinks, which the paper has not, and a window of 32 unless they say otherwise."
)

"""results.json as the suite wrote it: read, checked, and asked for its modes, budgets, methods and tasks."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from kvshrink.attach.budget import TOLERANCE
from kvshrink.errors import ArtifactError, EvalError
from kvshrink.eval.report.old_keys import renamed
from kvshrink.eval.run.entries import CONTROLS, ZEROS
from kvshrink.store import files

FORMAT = "kvshrink results 1"
NAME = "results.json"
MAIN_MODE = "agnostic"
AGAIN = "Run `kvshrink eval suite` again to write it."

_ENTRY = ("method", "series", "target", "length")
_LINE = (
    "task mode reached setting cases score low high interval byte_ratio bytes_per_token tokens seconds_per_token time"
)
_FIDELITY = (
    "mode chunk documents positions byte_ratio kl_mean kl_low kl_high kl_median kl_p95 kl_p99 kl_p999 kl_max top1 top5"
)
MOST = 2**28  # bytes
NAMES, TEXTS = {"method", "series", "task", "mode", "reason", "error"}, {"setting", "interval"}
COUNTS = {"length", "cases", "documents", "positions", "layer"}
# what is read of every entry of a list
FIELDS = {
    "lines": (*_ENTRY, *_LINE.split(), "lost", "won", "delta", "delta_low", "delta_high", "p"),
    "grid": (*_ENTRY, "task", "mode", "depth", "score", "cases"),
    "fidelity": (
        *(*_ENTRY, *_FIDELITY.split(), "dp_rms", "dnll", "dnll_low", "dnll_high", "ppl", "ppl_full", "bits_per_byte"),
        *("trajectory_prefix", "trajectory_agreement", "by_distance"),
    ),
    "layers": (*_ENTRY, "layer", "key_error", "key_rope_error", "value_error", "output_error", "output_cosine"),
    "memory": (*_ENTRY, "held", "full", "byte_ratio", "peak"),
    "skipped": ("task", "length", "reason"),
    "failures": ("method", "task", "length", "error"),
}


def read(folder: Path) -> dict:
    """The results in a folder. Raises EvalError if there are none, or none of this format."""
    path = folder / NAME
    if not folder.is_dir():
        raise EvalError(f"{folder} is no folder. Give the one that `kvshrink eval suite --out` wrote.")
    if not path.is_file():
        if any(folder.glob("outcomes*.jsonl")):
            raise EvalError(
                f"{folder} holds outcomes but no {NAME}: the suite was interrupted. Run its command again; it goes on."
            )
        raise EvalError(f"{folder} holds no {NAME}. Give the folder that `kvshrink eval suite --out` wrote.")
    return read_file(path)


def read_file(path: Path) -> dict:
    """The results in a file. Raises EvalError if it cannot be read or is of another format."""
    try:
        results = renamed(files.read_json(path, MOST, finite=False))
    except ArtifactError as error:
        raise EvalError(str(error)) from error
    if results.get("format") != FORMAT:
        found = results.get("format")
        raise EvalError(f"{path} has the format {found!r}, not {FORMAT!r}. {AGAIN}")
    if not isinstance(results.get("settings"), dict):
        raise EvalError(f"{path} has no settings. It is edited. {AGAIN}")
    for name, fields in FIELDS.items():
        entries = results.setdefault(name, [])
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise EvalError(f"{path}: {name} is no list of objects. It is edited. {AGAIN}")
        for i, entry in enumerate(entries):
            if missing := [f for f in fields if f not in entry]:
                raise EvalError(f"{path}: {name}[{i}] has no {missing[0]!r}. It is edited. {AGAIN}")
            if wrong := [f for f in fields if not _right(name, f, entry[f])]:
                raise EvalError(f"{path}: {name}[{i}] has {wrong[0]}={entry[wrong[0]]!r:.40}. It is edited. {AGAIN}")
    return results


def _right(name: str, field: str, value: object) -> bool:
    """Whether a field holds what the suite writes there: a text, a number, or None for what was not measured."""
    if field in NAMES:
        return isinstance(value, str)
    if field in COUNTS:
        return isinstance(value, int) or (value is None and field == "length" and name != "fidelity")
    if field in TEXTS:
        return value is None or isinstance(value, str)
    if field == "by_distance" and isinstance(value, list):
        return all(isinstance(x, dict) and all(map(_is_measured, x.values())) for x in value)
    return _is_measured(value)


def _is_measured(value: object) -> bool:
    return value is None or isinstance(value, int | float)


def unique(values: Iterable) -> list:
    """In order of first appearance."""
    return list(dict.fromkeys(values))


def of(entries: Sequence[dict], **wanted: object) -> list[dict]:
    """The entries whose fields have these values."""
    return [e for e in entries if all(e[k] == v for k, v in wanted.items())]


def known(values: Iterable) -> list:
    """Without what was not measured."""
    return [v for v in values if v is not None]


def modes(results: dict) -> list[str]:
    """The modes of the lines, the harder and default one first."""
    return sorted(unique(e["mode"] for e in results["lines"]), key=lambda mode: mode != MAIN_MODE)


def telling(results: dict, mode: str) -> list[dict]:
    """The lines of a mode on whose task and length the full cache is above a cache of zeros: its paired interval leaves
    0 out, or zeros was not run. Elsewhere the model cannot do the task, and a method has nothing to lose."""
    lines = of(results["lines"], mode=mode)
    zeros = of(lines, series=ZEROS)
    below = {(e["task"], e["length"]) for e in zeros if e["delta_high"] is None or e["delta_high"] >= 0}
    return [e for e in lines if (e["task"], e["length"]) not in below]


def silent(results: dict) -> list[str]:
    """What `telling` leaves out, "task, length, mode"."""
    names = [f"{e['task']} {e['length']} {e['mode']}" for e in results["lines"]]
    told = {f"{e['task']} {e['length']} {m}" for m in modes(results) for e in telling(results, m)}
    return unique(name for name in names if name not in told)


def reached(lines: Sequence[dict]) -> bool:
    """Whether a method's measured bytes are within 5 % of its budget, as a mean over lines, if it has one."""
    target, ratios = lines[0]["target"], known(e["byte_ratio"] for e in lines)
    return not target or not ratios or sum(abs(k / target - 1) for k in ratios) / len(ratios) <= TOLERANCE


def entries(results: dict) -> list[dict]:
    """Whatever names a method, from all lists."""
    return [e for name, fields in FIELDS.items() if "series" in fields for e in results[name]]


def series(results: dict) -> list[str]:
    """The methods without their budgets, controls last."""
    found = unique(e["series"] for e in entries(results))
    return [s for s in found if s not in CONTROLS] + [s for s in CONTROLS if s in found]


def targets(rows: Iterable[dict]) -> list[float | None]:
    """The budgets of methods, large to small; last None if a method was given settings instead."""
    found = unique(e["target"] for e in rows if e["series"] not in CONTROLS)
    return sorted(found, key=lambda t: -1.0 if t is None else t, reverse=True)


def budget(target: float | None) -> str:
    """0.1 -> "10 % of the bytes"."""
    return "own settings" if target is None else f"{100 * target:g} % of the bytes"


def fidelity_groups(results: dict) -> list[list[dict]]:
    """Fidelity rows that may be compared: of one mode, chunk and prefix length; the longest prefix first."""
    groups: dict = {}
    for e in results["fidelity"]:
        groups.setdefault((e["mode"], e["chunk"], e["length"]), []).append(e)
    # `decode` stands for what a user meets: one token at a time
    return [groups[k] for k in sorted(groups, key=lambda k: (k[0] != "decode", str(k[:2]), -k[2]))]

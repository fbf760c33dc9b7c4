"""kvshrink models: the types of models that were run, what became of each, and why where it is refused."""

import json as json_module
from typing import Annotated, Any, Literal

import typer

from kvshrink import data
from kvshrink.cli._common import JsonOption, console, print_json, print_table
from kvshrink.errors import KVShrinkError

STATUS = {
    "identical": "runs",
    "refused": "refused",
    "different": "differs",
    "crashed": "fails",
    "not built": "not tried",
    "no text alone": "not tried",
    "skipped": "not tried",
}


def models(
    name: Annotated[str | None, typer.Argument(help="A part of a type's name, such as qwen3.")] = None,
    kind: Annotated[Literal["text", "image-text"] | None, typer.Option(help="Models of this kind alone.")] = None,
    refused: Annotated[bool, typer.Option("--refused", help="Those that are refused, with the reason.")] = False,
    json: JsonOption = False,
) -> None:
    """Which model types run: tiny random models of each were run over a lossless cache, beside transformers' own.

    A type is config.model_type. What is seen of your own model, and whether it runs, `kvshrink inspect --model` says.
    """
    found = json_module.loads(data.path("models.json").read_text(encoding="utf-8"))
    rows = [r for r in found["rows"] if (kind is None or r["kind"] == kind) and (name or "") in r["type"]]
    if not rows:
        raise KVShrinkError(f"no type's name has {name!r} in it. `kvshrink models` shows all of them.")
    if refused:
        rows = [r for r in rows if STATUS[r["status"]] not in ("runs", "not tried")]
    lines = [_cells(r) for r in sorted(rows, key=lambda r: (r["kind"], r["type"]))]
    print_table(("type", "kind", "cache", "shrunken layers", "keys, or why not"), lines)
    counts = ", ".join(
        f"{by_status.get('identical', 0)} {kind} types run, {by_status.get('refused', 0)} are refused"
        for kind, by_status in found["counts"].items()
    )
    console.print(f"of all types of transformers {found['transformers']}: {counts}; the others could not be tried")
    if json:
        print_json({"transformers": found["transformers"], "counts": found["counts"], "models": rows})


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    status = STATUS[row["status"]]
    if status != "runs":
        return row["type"], row["kind"], status, "", row["reason"]
    return row["type"], row["kind"], status, f"{row['compressed']} of {row['layers']}", ", ".join(row["keys"])

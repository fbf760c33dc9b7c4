"""kvshrink eval ablations: the tables and figures of the CSKV paper in shape, on any model, with a page of findings."""

from pathlib import Path
from typing import Annotated

import typer

from kvshrink.cli._common import JsonOption, ModelOption, TextOption, console, load, print_json
from kvshrink.eval import calibration
from kvshrink.eval.ablations import EXPERIMENTS, chosen
from kvshrink.eval.ablations import run as runs
from kvshrink.eval.ablations.lab import Settings


def ablations(
    model: ModelOption = "reference",
    only: Annotated[str, typer.Option(help=f"Of {', '.join(EXPERIMENTS)}; none: all.")] = "",
    cases: Annotated[int, typer.Option(min=1, help="Samples of each task.")] = 20,
    documents: Annotated[int, typer.Option(min=0, help="Held-out texts for the KL; 0: none.")] = 4,
    scored: Annotated[int, typer.Option(min=1, help="Tokens of each text that are compared.")] = 64,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps of every training; the paper has 12,000.")] = 1000,
    length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of texts and long tasks; default: the model's context, to 4096.")
    ] = None,
    text: TextOption = None,
    seed: Annotated[int, typer.Option(help="Of samples and documents.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for results; run again to resume.")] = Path("ablations"),
    json: JsonOption = False,
) -> None:
    """Run the CSKV paper's ablations; write a JSON and a picture each, and ablations.md."""
    names = tuple(part.strip() for part in only.split(",") if part.strip())
    chosen(names)  # refused now rather than after the model is loaded
    settings = Settings(model, names, cases, documents, scored, steps, length, seed)
    net, tokenizer = load(model)
    done = runs.run(settings, net, tokenizer, calibration.texts(text), out, _command(settings, text))
    for failure in done["failures"]:
        where = f"{failure['experiment']}, {failure['method']} on {failure['task']}"
        console.print(f"failed: {where}: {failure['error']}", markup=False)
    for name, seconds in done["seconds"].items():
        console.print(f"{name}: {seconds:.0f} s", markup=False)
    console.print(f"wrote {out / runs.PAGE}")
    if json:
        print_json({"out": str(out), "page": str(out / runs.PAGE), **done})


def _command(s: Settings, text: Path | None) -> str:
    """What makes these results again."""
    parts = [f"kvshrink eval ablations --model {s.model}"]
    parts += [f"--{name} {getattr(s, name)}" for name in ("cases", "documents", "scored", "steps", "seed")]
    parts += [f"--length {s.length}"] if s.length else []
    return " ".join(parts + ([f"--text {text}"] if text else []))

"""The tables and figures of the CSKV paper in shape, on any model, with a page of findings.

The numbers behind docs/results/ablations (hours), and its page and pictures made again of its JSON (seconds):

    python -m recipes.cskv_paper --cases 12 --documents 4 --steps 500 --out ablations
    python -m recipes.cskv_paper --redraw docs/results/ablations

The first goes on where it stopped when it is run again.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
import typer.main

from kvshrink.cli._common import (
    MANY,
    MOST_CASES,
    JsonOption,
    ModelOption,
    SeedOption,
    TextOption,
    console,
    load,
    names,
    print_json,
    refuse_scored,
)
from kvshrink.cli._guard import exit_code
from kvshrink.cli._outputs import digest, place, run_folder
from kvshrink.errors import SettingError
from kvshrink.eval.run import calibration
from recipes.cskv_paper import EXPERIMENTS, chosen
from recipes.cskv_paper import run as runs
from recipes.cskv_paper.lab import Settings

SCORED, STEPS = 64, 1000
UNTRAINED = {"split"}  # experiments of closed forms alone
BEGUN = ("outcomes.jsonl", "fidelity.jsonl", "artifacts")


def ablations(
    model: ModelOption = "reference",
    only: Annotated[str | None, typer.Option(help=f"Of {', '.join(EXPERIMENTS)}; default: all.")] = None,
    cases: Annotated[int, typer.Option(min=1, max=MOST_CASES, help="Samples of each task.")] = 20,
    documents: Annotated[int, typer.Option(min=0, max=MOST_CASES, help="Held-out texts for the KL; 0: none.")] = 4,
    scored: Annotated[
        int | None, typer.Option(min=1, max=MANY, help="Tokens of each text that are compared; default: 64.")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1, max=MANY, help="Optimiser steps of every training; default: 1000, and the paper has 12,000."
        ),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(min=1, max=MANY, help="Tokens of texts and long tasks; default: the model's context, to 4096."),
    ] = None,
    text: TextOption = None,
    seed: SeedOption = 0,
    out: Annotated[Path, typer.Option(help="Folder for results; run again to resume.")] = Path("ablations"),
    redraw: Annotated[
        Path | None, typer.Option(help="Measure nothing: the page and pictures of the numbers in this folder.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Run the CSKV paper's ablations; write a JSON and a picture each, and ablations.md."""
    if redraw is not None:
        console.print(f"wrote {runs.redraw(redraw)}")
        return
    refuse_scored(scored, documents)
    experiments = chosen(tuple(names("only", only) or ()))
    if steps is not None and set(experiments) <= UNTRAINED:
        raise SettingError(f"--steps {steps} has no effect: {', '.join(experiments)} trains nothing. Leave it out.")
    settings = Settings(
        model, tuple(experiments) if only else (), cases, documents, scored or SCORED, steps or STEPS, length, seed
    )
    texts = calibration.texts(text)
    asked = {"command": "recipes.cskv_paper", **asdict(settings), "model": place(model), "text": digest(text, texts)}
    del asked["only"]  # each experiment has files of its own
    with run_folder(out, asked, [runs.PAGE, "*.png", *(f"{name}.json" for name in EXPERIMENTS)], BEGUN):
        net, tokenizer = load(model)
        done = runs.run(settings, net, tokenizer, texts, out, _command(settings, text))
    for failure in done["failures"]:
        where = f"{failure['experiment']}, {failure['method']} on {failure['task']}"
        console.print(f"failed: {where}: {failure['error']}")
    for name, seconds in done["seconds"].items():
        console.print(f"{name}: {seconds:.0f} s")
    console.print(f"wrote {out / runs.PAGE}")
    if json:
        print_json({"out": str(out), "page": str(out / runs.PAGE), **done})


def _command(s: Settings, text: Path | None) -> str:
    """What makes these results again."""
    parts = [f"python -m recipes.cskv_paper --model {s.model}"]
    parts += [f"--{name} {getattr(s, name)}" for name in ("cases", "documents", "scored", "steps", "seed")]
    parts += [f"--length {s.length}"] if s.length else []
    return " ".join(parts + ([f"--text {text}"] if text else []))


def main(arguments: Sequence[str] | None = None) -> None:
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command()(ablations)

    def run(given: Sequence[str]) -> None:
        command = typer.main.get_command(app)
        with command.make_context("python -m recipes.cskv_paper", list(given)) as context:
            command.invoke(context)

    sys.exit(exit_code(run, sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    main()

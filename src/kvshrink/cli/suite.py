"""kvshrink eval suite: every offline task, methods at equal real bytes, one page as the result."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from kvshrink.cli._common import (
    MANY,
    MOST_CASES,
    MOST_ROWS,
    JsonOption,
    ModelOption,
    SeedOption,
    TextOption,
    console,
    load,
    names,
    print_json,
    print_table,
    refuse_scored,
    refuse_text,
)
from kvshrink.cli._outputs import digest, place, run_folder
from kvshrink.errors import SettingError
from kvshrink.eval import report
from kvshrink.eval.run import calibration
from kvshrink.eval.run.entries import parse, specs
from kvshrink.eval.run.suite import Settings, Suite

SCORED = 128
WRITES = ("results.json", "report.html", "leaderboard.md", "*.png", "*.svg")
BEGUN = ("outcomes.jsonl", "fidelity.jsonl", "artifacts")
METHODS = "cskv,cskv:bits=4,rtn,streaming_llm"


def suite(
    model: ModelOption = "reference",
    methods: Annotated[
        str, typer.Option(help="name,name:setting=value,...: a budget sets what is not given.")
    ] = METHODS,
    byte_ratio: Annotated[
        str, typer.Option(help="Budgets: bytes held over the full cache's, everything counted.")
    ] = "0.2,0.1,0.06",
    tasks: Annotated[
        str | None, typer.Option(help="Names or titles, such as passkey,ruler,ruler/vt; default: all.")
    ] = None,
    stored: Annotated[
        list[str] | None, typer.Option(help="Repeatable: a task with a file, longbench:subset=qasper,path=FILE.")
    ] = None,
    lengths: Annotated[
        str | None, typer.Option(help="Tokens; default: the model's context (to 4096), its half, its quarter.")
    ] = None,
    modes: Annotated[str, typer.Option(help="Of agnostic, aware, multi_turn.")] = "agnostic,multi_turn",
    cases: Annotated[
        int,
        typer.Option(min=1, max=MOST_CASES, help="Samples per task and length; whole contexts where they are shared."),
    ] = 10,
    documents: Annotated[int, typer.Option(min=0, max=MOST_CASES, help="Held-out texts for fidelity; 0: none.")] = 4,
    scored: Annotated[
        int | None, typer.Option(min=1, max=MANY, help="Tokens of each text that are compared; default: 128.")
    ] = None,
    text: TextOption = None,
    seed: SeedOption = 0,
    batch: Annotated[int, typer.Option(min=1, max=MOST_ROWS, help="Contexts that go through the model together.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder for results and report; run again to resume.")] = Path("suite"),
    json: JsonOption = False,
) -> None:
    """Run all offline tasks that the model's context allows, and fidelity, at equal real bytes; write a report."""
    refuse_scored(scored, documents)
    settings = Settings(
        model=model,
        methods=tuple(specs(methods)),
        byte_ratio=tuple(_numbers("byte-ratio", byte_ratio, float)),
        tasks=tuple(names("tasks", tasks) or ()),
        stored=tuple(stored or ()),
        lengths=tuple(_numbers("lengths", lengths, int)),
        modes=tuple(names("modes", modes) or ()),
        cases=cases,
        documents=documents,
        scored=scored or SCORED,
        seed=seed,
        batch=batch,
    )
    refuse_text(text, [parse(m).method for m in settings.methods])
    texts = calibration.texts(text)
    asked = {"command": "eval suite", **asdict(settings), "model": place(model), "text": digest(text, texts)}
    report.check_installed()  # without them the run would end in nothing
    with run_folder(out, asked, WRITES, BEGUN):
        net, tokenizer = load(model)
        data = Suite(settings, net, tokenizer, texts, out).run(_command(settings, text))
        page = report.build(out)
    head, rows = report.overview(data)
    print_table(head, rows)
    for left in data["skipped"]:
        line = f"left out: {left['task']} at {left['length']} tokens: {left['reason']}"
        console.print(line)
    if silent := report.silent(data):
        console.print(f"not averaged, since the full cache is not above zeros: {len(silent)}, listed in the report")
    for failure in data["failures"]:
        console.print(f"failed: {failure['method']} on {failure['task']}: {failure['error']}")
    console.print(f"wrote {page}")
    if json:
        print_json({"out": str(out), "report": str(page), "failures": data["failures"], "lines": data["lines"]})


def _numbers(name: str, text: str | None, kind: type) -> list:
    parts = names(name, text) or ()
    try:
        return [kind(part) for part in parts]
    except ValueError as error:
        raise SettingError(f"--{name} {text!r}: give numbers with commas between them.") from error


def _command(s: Settings, text: Path | None) -> str:
    """What makes these results again."""
    parts = ["kvshrink eval suite", f"--model {s.model}", f'--methods "{",".join(s.methods)}"']
    parts += [
        f"--{name.replace('_', '-')} {','.join(map(str, value))}"
        for name in ("byte_ratio", "tasks", "lengths", "modes")
        if (value := getattr(s, name))
    ]
    parts += [f'--stored "{x}"' for x in s.stored]
    parts += [f"--{name} {getattr(s, name)}" for name in ("cases", "documents", "scored", "seed", "batch")]
    return " ".join(parts + ([f"--text {text}"] if text else []))

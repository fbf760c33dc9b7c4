"""kvshrink eval: one task, for every method the accuracy beside the bytes really held. `eval suite` runs them all."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from kvshrink.cli import ablations, perplexity, suite
from kvshrink.cli._common import (
    BitsOption,
    JsonOption,
    KeepOption,
    ModelOption,
    TextOption,
    guarded,
    load,
    print_json,
    print_table,
)
from kvshrink.eval import calibration, report, tasks
from kvshrink.eval.catalogue import arguments, check_context
from kvshrink.eval.entries import FULL, Entry, parse, parse_settings
from kvshrink.eval.fitting import fitted
from kvshrink.eval.outcomes import Log
from kvshrink.eval.prompt import encode
from kvshrink.eval.runner import Job, Runner
from kvshrink.eval.summary import HEAD, cells, summarise
from kvshrink.methods.artifact import Artifact
from kvshrink.store import files

DEFAULT = ["cskv", "cskv:keep=0.2,bits=4", "streaming_llm:like=cskv keep=0.2 bits=4"]

Context = typer.Context.__base__  # what typer really passes: an object of its parent class

app = typer.Typer(
    help="Compare methods on one task (no subcommand), on all (suite), by perplexity, or as CSKV did (ablations)."
)


def evaluate(
    context: Context,
    model: ModelOption = "reference",
    task: Annotated[
        str, typer.Option(help="A task, or task:setting=value,... (docs/evaluation.md).")
    ] = "longeval:official=True,lines=30",
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            help="Repeatable: name, name:setting=value,..., or 'streaming_llm:like=<label>' for the same bytes. "
            "'full' is always there; 'zeros' is a cache of zeros.",
        ),
    ] = None,
    artifact: Annotated[list[Path] | None, typer.Option(help="Repeatable: a fitted artifact.")] = None,
    keep: KeepOption = None,
    bits: BitsOption = None,
    text: TextOption = None,
    cases: Annotated[int, typer.Option(min=1, help="Cases per method.")] = 50,
    tokens: Annotated[
        int, typer.Option(min=64, help="Length of a case, where the task has no length of its own.")
    ] = 4000,
    seed: Annotated[int, typer.Option(help="Of generated cases.")] = 0,
    mode: Annotated[
        Literal["agnostic", "aware", "multi_turn"],
        typer.Option(
            help="agnostic: compress before the question is seen; aware: after; multi_turn: one after another."
        ),
    ] = "agnostic",
    batch: Annotated[int, typer.Option(min=1, help="Contexts that go through the model together.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Folder for results and plot; run again to resume.")] = None,
    json: JsonOption = False,
) -> None:
    """Compare methods on a task. Unless --mode says otherwise, a context is compressed before the question is seen."""
    if context.invoked_subcommand is not None:  # type: ignore[attr-defined]
        return
    given = {k: v for k, v in (("keep", keep), ("bits", bits)) if v is not None}
    entries = [parse(spec, given) for spec in (method or ([] if artifact else DEFAULT))]
    entries += [Entry(str(folder), Artifact.from_pretrained(folder)) for folder in artifact or []]
    name, _, rest = task.partition(":")
    module = tasks.get(name)
    net, tokenizer = load(model)
    settings = arguments(module, parse_settings(rest), tokens, tokenizer, model == "reference")
    samples = module.samples(cases, seed, **settings)
    check_context(net, max(sum(map(len, encode(s, tokenizer))) + s.max_new_tokens for s in samples))
    todo = [Entry(FULL, None), *(e for e in entries if e.label != FULL)]
    ready = fitted(todo, net, tokenizer, calibration.texts(text))
    runner = Runner(net, tokenizer, ready, batch)
    outcomes = runner.run(Job(task, mode, tokens), samples, Log(out / "outcomes.jsonl" if out else None))
    results = summarise(outcomes, ready)
    print_table(HEAD, [cells(line) for line in results])
    data = {"model": model, "task": task, "seed": seed, "mode": mode, "results": [line.to_dict() for line in results]}
    if out is not None:
        files.write_json(out / "results.json", data)
        report.accuracy(results, mode, out / "accuracy.png")
    if json:
        print_json(data)


app.callback(invoke_without_command=True)(guarded(evaluate))
app.command("ablations")(guarded(ablations.ablations))
app.command("suite")(guarded(suite.suite))
app.command("perplexity")(guarded(perplexity.perplexity))

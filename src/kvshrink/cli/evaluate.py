"""kvshrink eval: one task, for every method the accuracy beside the bytes really held. `eval suite` runs them all."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import typer

from kvshrink.cli import perplexity, suite
from kvshrink.cli._common import (
    MANY,
    MOST_CASES,
    MOST_ROWS,
    BitsOption,
    JsonOption,
    KeepOption,
    ModelOption,
    SeedOption,
    TextOption,
    given_settings,
    load,
    print_json,
    print_table,
    refuse_text,
)
from kvshrink.cli._outputs import digest, place, run_folder
from kvshrink.errors import SettingError
from kvshrink.eval import report, tasks
from kvshrink.eval.report import plots
from kvshrink.eval.report.summary import HEAD, cells, summarise
from kvshrink.eval.run import calibration, entries
from kvshrink.eval.run.catalogue import arguments, check_context, context_of, has_own_length, make_samples
from kvshrink.eval.run.entries import FULL, Entry, parse_all
from kvshrink.eval.run.fitting import fitted
from kvshrink.eval.run.prompt import encode
from kvshrink.eval.run.rounds import AWARE, MODES, MULTI_TURN, groups, shares_contexts
from kvshrink.eval.run.runner import Job, Runner
from kvshrink.eval.tasks import Sample
from kvshrink.methods.artifact import Artifact
from kvshrink.methods.text import parse_settings
from kvshrink.store import files
from kvshrink.store.log import Log

DEFAULT = ["cskv", "cskv:keep=0.2,bits=4", "streaming_llm:like=cskv keep=0.2 bits=4"]
TOKENS = 4000
WRITES = ("outcomes.jsonl", "results.json", "accuracy.png")

Context = typer.Context.__base__  # what typer really passes: an object of its parent class

app = typer.Typer(help="Compare methods on one task (no subcommand), on all (suite), or by perplexity.")


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
    cases: Annotated[int, typer.Option(min=1, max=MOST_CASES, help="Cases per method.")] = 50,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=64,
            max=MANY,
            help="Length of a case, where the task has no length of its own; default: the model's context, to 4000.",
        ),
    ] = None,
    seed: SeedOption = 0,
    mode: Annotated[
        Literal["agnostic", "aware", "multi_turn"],
        typer.Option(
            help="agnostic: compress before the question is seen; aware: after; multi_turn: one after another."
        ),
    ] = "agnostic",
    batch: Annotated[int, typer.Option(min=1, max=MOST_ROWS, help="Contexts that go through the model together.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Folder for results and plot; run again to resume.")] = None,
    json: JsonOption = False,
) -> None:
    """Compare methods on a task. Unless --mode says otherwise, a context is compressed before the question is seen."""
    call: Any = context  # of click, whose types typer does not hand on
    given = [p for p in call.params if call.get_parameter_source(p).name == "COMMANDLINE"]
    if call.invoked_subcommand is not None:
        _refuse_before(call.invoked_subcommand, given)
        return
    chosen = [Entry(FULL, None)]
    chosen += parse_all(method or ([] if artifact else DEFAULT), given_settings(keep, bits))
    chosen += [Entry(str(folder), Artifact.from_pretrained(folder)) for folder in artifact or []]
    chosen = [chosen[0], *(e for e in chosen[1:] if e.label != FULL or e.method is not None)]
    entries.check(chosen)
    refuse_text(text, [e.method for e in chosen])
    texts = calibration.texts(text)
    name, _, rest = task.partition(":")
    module, own = tasks.get(name), parse_settings(rest)
    if tokens is not None and ("tokens" in own or has_own_length(module, own)):
        raise SettingError(f"--tokens {tokens} has no effect: {task} says how long it is. Leave it out.")
    asked: dict = {"command": "eval", "model": place(model), "task": task, "methods": [e.label for e in chosen]}
    asked |= {"text": digest(text, texts), "cases": cases, "tokens": tokens, "seed": seed, "mode": mode, "batch": batch}
    if out is not None:
        plots.pyplot()  # without it the run would end in nothing
    with run_folder(out, asked, WRITES) if out is not None else nullcontext():
        net, tokenizer = load(model)
        length = tokens or min(TOKENS, context_of(net) or TOKENS)
        settings = arguments(module, own, length, tokenizer, model == "reference")
        first = _samples(net, tokenizer, module, 1, seed, settings)  # what it refuses costs no time
        _check_effects(module, settings, first, seed if "seed" in given else None, batch, mode)
        next(groups(first, mode, tokenizer, batch))
        samples = _samples(net, tokenizer, module, cases, seed, settings)
        most = max(group.tokens() for group in groups(samples, mode, tokenizer, batch))
        check_context(net, most, "the longest conversation" if mode == MULTI_TURN else "the longest case")
        ready = fitted(chosen, net, tokenizer, texts)
        runner = Runner(net, tokenizer, ready, batch)
        outcomes = runner.run(Job(task, mode, length), samples, Log(out / WRITES[0] if out else None))
        results = summarise(outcomes, ready)
        print_table(HEAD, [cells(line) for line in results])
        lines = [line.to_dict() for line in results]
        data = {"model": model, "task": task, "seed": seed, "mode": mode, "results": lines}
        if out is not None:
            files.write_json(out / "results.json", data)
            report.accuracy(results, mode, out / "accuracy.png")
    if json:
        print_json(data)


def _refuse_before(command: str, given: Sequence[str]) -> None:
    """Options of `eval` itself have no effect on a subcommand."""
    if given:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise SettingError(f"{names} before {command} has no effect. Put it behind: kvshrink eval {command} --help.")


def _samples(net: Any, tokenizer, module: ModuleType, cases: int, seed: int, settings: dict) -> list[Sample]:
    """The samples. Raises EvalError if they are longer than the model's context, if need be before they are made."""
    check_context(net, settings.get("tokens") or 0)
    samples = make_samples(module, cases, seed, settings)
    check_context(net, max(sum(map(len, encode(s, tokenizer))) + s.max_new_tokens for s in samples))
    return samples


def _check_effects(
    module: ModuleType, settings: dict, samples: Sequence[Sample], seed: int | None, batch: int, mode: str
) -> None:
    """Raise SettingError on a seed or a batch that changes nothing.

    samples: of one context; seed: None if it was not given.
    """
    if seed is not None and samples == make_samples(module, 1, seed + 1, settings):
        raise SettingError(f"--seed {seed} has no effect: the cases are those of a file. Leave it out.")
    if batch > 1 and mode != AWARE and (mode == MODES[2] or shares_contexts(samples)):
        raise SettingError(f"--batch {batch} has no effect: questions on one context go one by one. Leave it out.")


app.callback(invoke_without_command=True)(evaluate)
app.command("suite")(suite.suite)
app.command("perplexity")(perplexity.perplexity)

"""kvshrink demo: the whole thing on the bundled model, in minutes and with no network."""

import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from kvshrink.attach import attach, make_cache
from kvshrink.attach.fill import fill, prefill
from kvshrink.cli._common import JsonOption, console, load, print_json, print_table
from kvshrink.cli._outputs import run_folder
from kvshrink.eval import report, tasks
from kvshrink.eval.report import plots
from kvshrink.eval.report.summary import HEAD, Line, cells, summarise
from kvshrink.eval.run import calibration, prompt
from kvshrink.eval.run.catalogue import choices, gather
from kvshrink.eval.run.entries import parse
from kvshrink.eval.run.fitting import fitted
from kvshrink.eval.run.runner import Job, Runner
from kvshrink.methods.artifact import Artifact
from kvshrink.reference import smollm2
from kvshrink.store import files

SPECS = (
    "full",
    "cskv:keep=0.5",
    "cskv:keep=0.2",
    "cskv:keep=0.2,bits=4",
    "streaming_llm:like=cskv keep=0.2 bits=4",
    "rtn:bits=2",
    "spectral:budget=0.03",
)
# on a real model, where it is installed: nothing to fit
REAL = ("full", "tcq:bits=4", "tcq:bits=2", "streaming_llm:like=tcq bits=4")
REAL_TASK, REAL_TOKENS, REAL_CASES = "ruler/niah_single_1", 1500, 5
WRITES = ("artifact", "results.json", "accuracy.png")


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the table, the plot and the artifact.")] = Path("demo"),
    cases: Annotated[int, typer.Option(min=1, max=50, help="Cases per method and task.")] = 25,
    json: JsonOption = False,
) -> None:
    """Fit CSKV and spectral bits on the bundled model, answer LongEval cases and 4k passkeys from shrunken caches.

    Then SmolLM2, a real model, finds a number in 1,500 tokens, where it is installed.
    """
    plots.pyplot()  # without it the run would end in nothing
    with run_folder(out, {"command": "demo", "cases": cases}, WRITES):
        _demo(out, cases, json)


def _demo(out: Path, cases: int, json: bool) -> None:
    started = time.perf_counter()
    model, tokenizer = load("reference")
    console.print("Fitting CSKV and spectral bits on the bundled reference model (4 layers, 128 KV channels).")
    entries = fitted([parse(spec) for spec in SPECS], model, tokenizer, calibration.texts(None))
    runner = Runner(model, tokenizer, entries)
    console.print("Answering. The context is compressed before the question is seen.")
    count = prompt.counter(tokenizer)
    lines = tasks.get("longeval").samples(cases, 0, lines=30)
    keys = tasks.get("passkey").samples(cases, 0, tokens=4000, count=count)
    outcomes = runner.run(Job("LongEval, official, 30 lines"), lines)
    outcomes += runner.run(Job("passkey, 4k tokens"), keys)
    results = summarise(outcomes, entries)
    print_table(HEAD, [cells(line) for line in results], "accuracy beside the bytes held, all included")
    artifact = entries[3].method
    assert isinstance(artifact, Artifact)
    artifact.save_pretrained(out / "artifact")
    _show_report(model, tokenizer, artifact, keys[0].context)
    data = {"seconds": round(time.perf_counter() - started, 1), "results": [line.to_dict() for line in results]}
    files.write_json(out / "results.json", data)
    report.accuracy(results, "agnostic", out / "accuracy.png")
    if smollm2.installed():
        data["smollm2"] = [line.to_dict() for line in _real(min(cases, REAL_CASES))]
        data["seconds"] = round(time.perf_counter() - started, 1)
        files.write_json(out / "results.json", data)
    else:
        console.print(f"SmolLM2, a real model, is not installed. {smollm2.REMEDY}")
    console.print(f"wrote {out}/accuracy.png, results.json and artifact/ in {data['seconds']:.0f} s")
    if json:
        print_json(data)


def _real(cases: int) -> list[Line]:
    """The same question to a real model: a number that stands somewhere in a long text."""
    console.print("SmolLM2-135M-Instruct, a real model: finding a number in 1,500 tokens.")
    model, tokenizer = load("smollm2")
    entries = [parse(spec) for spec in REAL]
    (task,), _ = gather(choices((REAL_TASK,)), [REAL_TOKENS], cases, 0, tokenizer, reference=False)
    ready = fitted(entries, model, tokenizer, [])
    results = summarise(Runner(model, tokenizer, ready).run(Job(task.title), task.samples), ready)
    print_table(HEAD, [cells(line) for line in results], "SmolLM2-135M-Instruct")
    return results


def _show_report(model, tokenizer, artifact, context: str) -> None:
    """One cache's bytes by layer and purpose, after a 4k prompt."""
    ids = torch.tensor([tokenizer(context)["input_ids"]], device=model.device)
    cache = make_cache(model, artifact)
    fill(cache, prefill(model, ids), attach(model))
    console.print(f"\nWhat CSKV keep=0.2 bits=4 holds after a prompt:\n{cache.report()}\n")

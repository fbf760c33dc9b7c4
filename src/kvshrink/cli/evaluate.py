"""kvshrink eval: accuracy of methods on a retrieval task, beside the bytes that they really hold."""

import hashlib
import json as json_module
from pathlib import Path
from typing import Annotated, Literal

import typer

from kvshrink.attach.factory import digest_of
from kvshrink.cli._common import (
    BitsOption,
    JsonOption,
    KeepOption,
    ModelOption,
    TextOption,
    load,
    print_json,
    print_table,
    read_text,
)
from kvshrink.eval import plots, tasks
from kvshrink.eval.entries import FULL, Entry, parse
from kvshrink.eval.runner import Runner
from kvshrink.eval.summary import HEAD, cells, summarise
from kvshrink.fit.job import fit_all
from kvshrink.methods._roles import Method
from kvshrink.methods.artifact import Artifact
from kvshrink.store import files

DEFAULT = ["cskv", "cskv:keep=0.2,bits=4", "streaming_llm:like=cskv keep=0.2 bits=4"]


def evaluate(
    model: ModelOption = "reference",
    task: Annotated[str, typer.Option(help="longeval, passkey or needle.")] = "longeval",
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            help="Repeatable: name, name:setting=value,..., or 'streaming_llm:like=<label>' for the same bytes. "
            "'full' is always there.",
        ),
    ] = None,
    artifact: Annotated[list[Path] | None, typer.Option(help="Repeatable: a fitted artifact.")] = None,
    keep: KeepOption = None,
    bits: BitsOption = None,
    text: TextOption = None,
    cases: Annotated[int, typer.Option(min=1, help="Cases per method.")] = 50,
    seed: Annotated[int, typer.Option(help="Of generated cases.")] = 0,
    path: Annotated[Path | None, typer.Option(help="An official LongEval JSONL, or a book for needle tasks.")] = None,
    lines: Annotated[int, typer.Option(min=0, help="longeval: lines of a record; 0: whole official records.")] = 30,
    generated: Annotated[bool, typer.Option("--generated", help="longeval: generated, not official records.")] = False,
    wording: Annotated[Literal["auto", "reference", "longeval"], typer.Option(help="longeval: prompt.")] = "auto",
    tokens: Annotated[int, typer.Option(min=64, help="passkey, needle: length of a case.")] = 4000,
    query_aware: Annotated[bool, typer.Option("--query-aware", help="Show the question before compressing.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for results and plot; run again to resume.")] = None,
    json: JsonOption = False,
) -> None:
    """Compare methods on a task. The context is compressed before the question is seen, unless --query-aware."""
    given = {k: v for k, v in (("keep", keep), ("bits", bits)) if v is not None}
    entries = [parse(spec, given) for spec in (method or ([] if artifact else DEFAULT))]
    entries += [Entry(str(folder), Artifact.from_pretrained(folder)) for folder in artifact or []]
    wording = ("reference" if model == "reference" else "longeval") if wording == "auto" else wording
    settings: dict = {"path": path}
    if task == "longeval":
        settings |= {"lines": lines or None, "official": not generated, "wording": wording}
    else:
        settings |= {"tokens": tokens}
    samples = tasks.get(task).samples(cases, seed, **settings)
    net, tokenizer = load(model)
    entries = fitted([Entry(FULL, None), *(e for e in entries if e.method is not None)], net, tokenizer, text)
    runner = Runner(net, tokenizer, entries, query_aware)
    data = {"model": model, "task": task, "seed": seed, "query_aware": query_aware, "settings": _plain(settings)}
    rows = out / f"outcomes-{_key(data, entries, samples, runner.attachment.fingerprint)}.jsonl" if out else None
    results = summarise(runner.run(task, samples, task, rows))
    print_table(HEAD, [cells(line) for line in results])
    data["results"] = [line.to_dict() for line in results]
    if out is not None:
        files.write_json(out / "results.json", data)
        plots.accuracy(results, out / "accuracy.png")
    if json:
        print_json(data)


def fitted(entries: list[Entry], model, tokenizer, text: Path | None) -> list[Entry]:
    """The entries with every method that needs it fitted, all in one pass over the text."""
    todo = [e.method for e in entries if isinstance(e.method, Method) and e.method.needs_fit]
    if not todo:
        return entries
    made = dict(zip(map(id, todo), fit_all(model, todo, read_text(text), tokenizer, batch=4), strict=True))
    return [Entry(e.label, made.get(id(e.method), e.method), e.like) for e in entries]


def _key(data: dict, entries: list[Entry], samples: list, model: str) -> str:
    """Names the file of outcomes by all that they depend on, so that a resumed run never takes another one's."""
    methods = [(e.label, e.like, None if e.method is None else digest_of(e.method)) for e in entries]
    prompts = [(s.prompt, s.answers) for s in samples]
    return hashlib.sha256(json_module.dumps([data, methods, prompts, model]).encode()).hexdigest()[:8]


def _plain(settings: dict) -> dict:
    return {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()}

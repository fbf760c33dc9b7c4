"""kvshrink plan: the method and settings that lose least within a budget of bytes, or hold least within one of KL."""

from pathlib import Path
from typing import Annotated

import typer

from kvshrink.attach.budget import CacheBudget
from kvshrink.cli._common import (
    MANY,
    MOST_CASES,
    JsonOption,
    LengthOption,
    ModelOption,
    SeedOption,
    TextOption,
    console,
    load,
    names,
    print_json,
    print_table,
    row_length,
)
from kvshrink.cli._outputs import check_file, check_picture
from kvshrink.errors import KVShrinkError, SettingError
from kvshrink.eval.run import calibration
from kvshrink.eval.run.catalogue import check_context
from kvshrink.fit.data import rows_hash, token_rows
from kvshrink.methods._roles import Method
from kvshrink.plan.bench import Bench, Point
from kvshrink.plan.budget import Budget, budget
from kvshrink.plan.check import Check, check
from kvshrink.plan.file import plan_of
from kvshrink.plan.picture import picture as draw
from kvshrink.plan.search import Search, pareto
from kvshrink.plan.space import METHODS, known, label
from kvshrink.store import files
from kvshrink.store.bytes import human
from kvshrink.store.log import Log

POINTS = "points.jsonl"  # in --work
HEAD = ("", "setting", "bytes", "of full cache", "KL, nats")


def plan(
    model: ModelOption = "reference",
    text: TextOption = None,
    tokens: Annotated[int, typer.Option(min=256, max=MANY, help="Tokens of a sequence.")] = 4096,
    batch: Annotated[int, typer.Option(min=1, max=MANY, help="Sequences held together.")] = 1,
    byte_ratio: Annotated[float | None, typer.Option(help="Budget: share of the full cache's bytes.")] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            help="Budget: the bytes that --tokens tokens x --batch sequences must fit in: 64MiB, 20GiB, 1000000."
        ),
    ] = None,
    kl: Annotated[float | None, typer.Option(help="Budget: nats; the fewest bytes that keep to it are found.")] = None,
    step_time: Annotated[
        float | None,
        typer.Option(help="Limit beside the budget: time of a decoding step here, in the full cache's. 1: no slower."),
    ] = None,
    methods: Annotated[str, typer.Option(help="Names with commas between them.")] = ",".join(METHODS),
    trials: Annotated[int, typer.Option(min=1, max=MOST_CASES, help="Settings that are tried.")] = 24,
    seed: SeedOption = 0,
    length: LengthOption = None,
    out: Annotated[Path | None, typer.Option(help="plan.json, which `kvshrink fit --plan` takes.")] = None,
    picture: Annotated[Path | None, typer.Option(help="The front as a picture.")] = None,
    work: Annotated[Path | None, typer.Option(help="Folder of what was measured; run again to resume.")] = None,
    json: JsonOption = False,
) -> None:
    """Search methods, bits, groups and windows for a budget: --byte-ratio, --memory or --kl. Prints the Pareto front.

    KL is measured on the last tenth of the text, which the fits do not see: passages of it come again, and the model
    reads the repetition over the shrunken cache. Bytes are all bytes of a sequence: scales, window, sinks, positions.
    """
    chosen_names = known(names("methods", methods) or METHODS)
    _check_outputs(out, picture, work)
    texts = calibration.texts(text)
    net, tokenizer = load(model)
    check_context(net, tokens)
    sizes = CacheBudget.of(net, tokens)
    asked = budget(sizes, batch, byte_ratio, memory, kl, step_time)
    rows = token_rows(texts, tokenizer, row_length(net, length), Method.page)
    bench = Bench(net, rows, sizes, Log(work / POINTS if work else None), True)
    settings = {"methods": chosen_names, "trials": trials, "seed": seed, "text": rows_hash(rows)}
    _refuse_another(out, {"model": bench.identity.digest, "budget": asked.described, **settings})
    search = Search(bench, asked, chosen_names, trials, seed)
    chosen = search.run()
    front = pareto(search.points)
    best = [p for name in chosen_names if (p := search.best_of(name, chosen.nbytes)) and p not in front]
    ready = bench.fitted(chosen.method) if chosen.method.needs_fit else chosen.method
    checked = check(net, ready, tokens, batch)
    pace = None if step_time is None else search.pace(chosen)
    data = plan_of(model, bench, asked, chosen, front, checked, pace, settings | {"points": len(search.points)})
    _show(asked, chosen, front, best, checked)
    if pace is not None:
        console.print(f"a step takes {pace:.2f} times the full cache's, measured here on {net.device}")
    if out is not None:
        files.write_json(out, data)
        then = f"kvshrink fit --plan {out} --out FOLDER" if chosen.method.needs_fit else "nothing to fit"
        console.print(f"wrote {out}: {then}")
    if picture is not None:
        draw(search.points, front, chosen, picture, f"{Path(model).name}: {batch} x {tokens} tokens")
        console.print(f"wrote {picture}")
    if json:
        print_json(data | {"measured": bench.measured})


def _check_outputs(out: Path | None, picture: Path | None, work: Path | None) -> None:
    if out is not None and picture is not None and out.resolve() == picture.resolve():
        raise SettingError(f"--out and --picture are one file, {out}. Name two.")
    if out is not None:
        check_file(out)
    if picture is not None:
        check_picture(picture)
    if work is not None:
        check_file(work / POINTS)


def _refuse_another(out: Path | None, asked: dict) -> None:
    """Raise SettingError on a file there that is no plan, or one of another request."""
    if out is None or not out.exists():
        return
    try:
        found = files.read_json(out)
        known = {"model": found["model"]["identity"]["digest"], "budget": found["budget"], **found["search"]}
    except (KVShrinkError, KeyError, TypeError) as error:
        raise SettingError(f"{out} is there and no plan. Choose another name.") from error
    if differ := [f"{k} {known.get(k)!r}, now {v!r}" for k, v in asked.items() if known.get(k) != v]:
        raise SettingError(f"{out} holds a plan with other settings: {'; '.join(differ)}. Choose another name.")


def _show(asked: Budget, chosen: Point, front: list[Point], best: list[Point], checked: Check) -> None:
    marks = {True: "front", False: "best of its method"}
    rows = [
        (
            "CHOSEN" if p == chosen else marks[p in front],
            label(p.method),
            human(p.nbytes * asked.batch),
            f"{100 * p.byte_ratio:.2f} %",
            f"{p.kl:.5f}",
        )
        for p in sorted([*front, *best], key=lambda p: (p.nbytes, p.kl))
    ]
    print_table(HEAD, rows, f"Pareto front for {asked.batch} x {asked.tokens} tokens")
    limit = f"{human((asked.nbytes or 0) * asked.batch)}" if asked.nbytes is not None else f"a KL of {asked.kl:g}"
    console.print(f"chosen within {limit}: {label(chosen.method)}")
    part = "" if checked.whole else f" (a part of it: {checked.batch} x {checked.tokens} tokens)"
    console.print(
        f"a real cache{part} holds {checked.nbytes} bytes, {100 * checked.nbytes / checked.full:.2f} % of the full "
        f"one; promised were {checked.promised}"
    )

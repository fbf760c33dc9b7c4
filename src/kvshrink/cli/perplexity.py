"""kvshrink eval perplexity: perplexity, and divergence from the full cache's predictions, in a named mode."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from kvshrink.cli._common import (
    MANY,
    MOST_CASES,
    BitsOption,
    JsonOption,
    KeepOption,
    ModelOption,
    SeedOption,
    TextOption,
    console,
    given_settings,
    load,
    print_json,
    print_table,
    refuse_text,
)
from kvshrink.errors import SettingError
from kvshrink.eval.run import calibration, entries
from kvshrink.eval.run.catalogue import check_context
from kvshrink.eval.run.entries import ZEROS, Entry, parse_all
from kvshrink.eval.run.fidelity import Fidelity, check_mode, fidelity
from kvshrink.eval.run.fitting import fitted
from kvshrink.eval.run.measure import book, held_out
from kvshrink.eval.run.perplexity import scored_bytes
from kvshrink.methods.artifact import Artifact

DEFAULT = ["cskv", "cskv:keep=0.2,bits=4", "rtn"]
HEAD = (
    "method",
    "perplexity",
    "full",
    "difference of NLL",
    "KL mean",
    "KL 99 %",
    "top-1",
    "bits/byte",
    "of full cache",
)


def perplexity(
    model: ModelOption = "reference",
    method: Annotated[list[str] | None, typer.Option("--method", help="Repeatable: name:setting=value,...")] = None,
    artifact: Annotated[list[Path] | None, typer.Option(help="Repeatable: a fitted artifact.")] = None,
    keep: KeepOption = None,
    bits: BitsOption = None,
    text: TextOption = None,
    on: Annotated[Path | None, typer.Option(help="Text to score; default: the bundled held-out book.")] = None,
    mode: Annotated[
        Literal["decode", "chunked", "prefix_compressed", "simulated"],
        typer.Option(help="decode: token by token; chunked; prefix_compressed: one forward; simulated: saves no byte."),
    ] = "decode",
    chunk: Annotated[int | None, typer.Option(min=1, max=MANY, help="Tokens a forward, for chunked (32).")] = None,
    prefix: Annotated[int, typer.Option(min=0, max=MANY, help="Tokens before the scored ones.")] = 1920,
    scored: Annotated[int, typer.Option(min=1, max=MANY, help="Tokens scored of each text.")] = 128,
    trajectory: Annotated[
        int, typer.Option(min=0, max=MANY, help="Tokens to generate after each prefix and compare.")
    ] = 0,
    documents: Annotated[int, typer.Option(min=1, max=MOST_CASES, help="Texts, evenly spread.")] = 4,
    seed: SeedOption = 0,
    json: JsonOption = False,
) -> None:
    """Score text through a shrunken cache. One exact prefill of it all would score the uncompressed model: refused."""
    if chunk is not None and mode != "chunked":
        raise SettingError(f"--chunk {chunk} has no effect in the mode {mode}. Leave it out, or use --mode chunked.")
    check_mode(mode, chunk, trajectory)
    chosen = parse_all(method or ([] if artifact else DEFAULT), given_settings(keep, bits))
    chosen += [Entry(str(folder), Artifact.from_pretrained(folder)) for folder in artifact or []]
    entries.check(chosen)
    for entry in chosen:
        if entry.like is not None or entry.label == ZEROS:
            raise SettingError(f"{entry.label!r} is for tasks only. Give it settings, or use `kvshrink eval`.")
    refuse_text(text, [e.method for e in chosen])
    texts = calibration.texts(text)
    scored_text = book(on)  # once, since it may be a pipe; before the model is loaded
    net, tokenizer = load(model)
    check_context(net, prefix + max(scored, trajectory))
    rows = held_out(tokenizer, prefix + scored, documents, seed, scored_text)
    ready = fitted(chosen, net, tokenizer, texts)
    size = sum(scored_bytes(tokenizer, ids, prefix) for ids in rows)
    methods = {e.label: e.method for e in ready}
    found = fidelity(
        net, methods, rows, prefix=prefix, mode=mode, chunk=chunk, trajectory=trajectory, n_bytes=size, seed=seed
    )
    any_of = next(iter(found.values()))
    step = "" if any_of.chunk is None else f", {any_of.chunk} tokens a forward"
    title = f"mode {mode}{step}: {scored} tokens of each of {documents} texts, after {prefix}"
    print_table(HEAD, [_cells(label, x) for label, x in found.items()], title)
    if trajectory:
        for label, x in found.items():
            console.print(
                f"{label}: greedy generation has {x.trajectory_prefix:.1f} of {x.trajectory_tokens} tokens in common "
                f"from the start, and {100 * (x.trajectory_agreement or 0):.1f} % at equal places; along the full "
                f"cache's own text KL is {x.generated_kl:.5f}{_growth(x.generated_growth)}"
            )
    if json:
        print_json({"model": model, "prefix": prefix, "methods": {k: x.to_dict() for k, x in found.items()}})


def _growth(ratio: float | None) -> str:
    return "" if ratio is None else f", in its last half {ratio:.2f} times that of the first"


def _cells(label: str, x: Fidelity) -> tuple[str, ...]:
    interval = "" if x.dnll_low is None else f" ({x.dnll_low:+.4f} to {x.dnll_high:+.4f})"
    ratio = "no byte saved" if x.byte_ratio is None else f"{100 * x.byte_ratio:.1f} %"
    numbers = (f"{x.ppl:.3f}", f"{x.ppl_full:.3f}", f"{x.dnll:+.4f}{interval}", f"{x.kl_mean:.5f}", f"{x.kl_p99:.4f}")
    return label, *numbers, f"{100 * x.top1:.1f} %", f"{x.bits_per_byte:.4f}", ratio

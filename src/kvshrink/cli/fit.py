"""kvshrink fit: fit a method to a model from text, layer by layer, and save the artifact."""

from pathlib import Path
from typing import Annotated

import typer

from kvshrink.cli._common import (
    BitsOption,
    JsonOption,
    KeepOption,
    ModelOption,
    SpecOption,
    TextOption,
    console,
    model_name,
    one_method,
    print_json,
    print_table,
    quiet,
)
from kvshrink.eval import calibration
from kvshrink.fit.job import fit_all
from kvshrink.fit.resume import clear
from kvshrink.store.bytes import human

CHECKPOINT = ".unfinished"


def fit(
    out: Annotated[Path, typer.Option(help="Folder for the artifact.")],
    model: ModelOption = "reference",
    method: SpecOption = "cskv",
    keep: KeepOption = None,
    bits: BitsOption = None,
    text: TextOption = None,
    length: Annotated[int, typer.Option(min=2, help="Tokens per calibration row.")] = 1024,
    batch: Annotated[int, typer.Option(min=1, help="Rows per forward pass.")] = 1,
    log_with: Annotated[str | None, typer.Option(help="Tracker for training losses: tensorboard or trackio.")] = None,
    json: JsonOption = False,
) -> None:
    """Fit a method to a model and save it. Weights are read one layer at a time; run again to resume."""
    quiet()
    chosen = one_method(method, keep, bits)
    texts, where = calibration.texts(text), model_name(model)
    checkpoint = out / CHECKPOINT
    artifact = fit_all(where, [chosen], texts, None, length, batch, True, checkpoint, log_with)[0]
    artifact.save_pretrained(out)
    clear(checkpoint)
    records = artifact.provenance["layers"]
    rows = [
        (i, method, *(f"{r[k]:.4f}" if k in r else "-" for k in ("key_error", "value_error")))
        for i, r in records.items()
    ]
    print_table(
        ("layer", "method", "key error", "value error"), rows, "squared error / variance, on the calibration text"
    )
    console.print(f"saved {out}: {human(artifact.nbytes)} per model, fitted in {artifact.provenance['seconds']} s")
    if json:
        print_json({"out": str(out), "nbytes": artifact.nbytes, **artifact.provenance, "model": artifact.model})

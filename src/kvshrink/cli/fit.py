"""kvshrink fit: fit a method to a model from text, layer by layer, and save the artifact."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import typer

from kvshrink.cli._common import (
    MOST_ROWS,
    BitsOption,
    JsonOption,
    KeepOption,
    LengthOption,
    ModelOption,
    SpecOption,
    TextOption,
    console,
    load,
    model_name,
    one_method,
    print_json,
    print_table,
    quiet,
    row_length,
)
from kvshrink.cli._outputs import digest, place, run_folder
from kvshrink.errors import ArtifactError, SettingError
from kvshrink.eval.run import calibration
from kvshrink.fit.given import in_memory, sharded
from kvshrink.fit.job import fit_all
from kvshrink.fit.resume import clear
from kvshrink.fit.source import OnDisk
from kvshrink.identity import difference
from kvshrink.methods import name_of
from kvshrink.methods._roles import Method
from kvshrink.methods.artifact import Artifact
from kvshrink.plan import file as plans
from kvshrink.store.bytes import human

CHECKPOINT = ".unfinished"
WRITES = ("kvshrink.json", "kvshrink.safetensors")


def fit(
    out: Annotated[Path, typer.Option(help="Folder for the artifact.")],
    model: ModelOption = "reference",
    method: SpecOption = None,
    plan: Annotated[Path | None, typer.Option(help="plan.json of `kvshrink plan` instead of --method.")] = None,
    keep: KeepOption = None,
    bits: BitsOption = None,
    text: TextOption = None,
    length: LengthOption = None,
    batch: Annotated[int, typer.Option(min=1, max=MOST_ROWS, help="Rows per forward pass.")] = 1,
    log_with: Annotated[
        Literal["tensorboard", "trackio"] | None, typer.Option(help="Tracker for training losses.")
    ] = None,
    shards: Annotated[
        int | None, typer.Option(min=1, help="Ranks of a tensor-parallel server, each with bases of its own heads.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Fit a method to a model and save it; run again to resume.

    Weights are read one layer at a time, unless the method asks the whole model what a loss costs (spectral).
    """
    quiet()
    changes = {"method": method, "keep": keep, "bits": bits, "shards": shards}
    chosen = one_method(method or "cskv", keep, bits) if plan is None else _planned(plan, model, changes)
    if shards is not None:
        chosen = sharded(chosen, shards)
    if log_with is not None and not getattr(chosen, "steps", 0):
        raise SettingError(f"--log-with {log_with} has no effect: {name_of(chosen)} trains nothing as it is set.")
    if not chosen.needs_fit:
        raise SettingError(f"{name_of(chosen)} needs no fit: give it to generate or eval as --method.")
    texts = calibration.texts(text)
    length = row_length(OnDisk(model_name(model)).model, length)
    asked: dict = {"command": "fit", "model": place(model), "method": name_of(chosen), "settings": chosen.settings()}
    asked |= {"text": digest(text, texts), "length": length}
    with run_folder(out, asked, WRITES, [CHECKPOINT]):
        source, tokenizer = load(model) if in_memory(chosen) else (model_name(model), None)
        artifact = fit_all(source, [chosen], texts, tokenizer, length, batch, True, out / CHECKPOINT, log_with)[0]
        artifact.save_pretrained(out)
        clear(out / CHECKPOINT)
    _show(artifact, chosen, out)
    if json:
        print_json({"out": str(out), "nbytes": artifact.nbytes, **artifact.provenance, "model": artifact.model["name"]})


def _show(artifact: Artifact, chosen: Method, out: Path) -> None:
    records = artifact.provenance["layers"]
    name = name_of(chosen)
    rows = [
        (i, name, *(f"{r[k]:.4f}" if k in r else "-" for k in ("key_error", "value_error"))) for i, r in records.items()
    ]
    print_table(
        ("layer", "method", "key error", "value error"), rows, "squared error / variance, on the calibration text"
    )
    console.print(f"saved {out}: {human(artifact.nbytes)} per model, fitted in {artifact.provenance['seconds']} s")


def _planned(plan: Path, model: str, changes: Mapping[str, object]) -> Method:
    """The plan's method. Raises if an option would change it, or if it was made for another model."""
    given = [f"--{k}" for k, v in changes.items() if v is not None]
    if given:
        raise SettingError(f"{', '.join(given)} cannot change the plan {plan}. Leave it out, or make another plan.")
    chosen, made_for = plans.read(plan)
    if different := difference(made_for.get("identity"), OnDisk(model_name(model)).identity(), str(plan)):
        raise ArtifactError(
            f"{plan} was made for {made_for.get('name')}: of {model} {different}. "
            "Pass that model by --model, or make a plan for this one."
        )
    return chosen

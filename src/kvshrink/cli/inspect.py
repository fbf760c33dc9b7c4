"""kvshrink inspect: a model's or an artifact's KV budget as a table, and its singular values as a picture."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from kvshrink.attach.families import shape_of
from kvshrink.attach.look import layers_of
from kvshrink.attach.projections import key_value_weights
from kvshrink.cache.layout import kernel_for
from kvshrink.cli._common import (
    BitsOption,
    JsonOption,
    KeepOption,
    ModelOption,
    SpecOption,
    console,
    model_name,
    one_method,
    print_json,
    print_table,
    quiet,
    refuse_beside,
)
from kvshrink.cli._outputs import check_picture
from kvshrink.errors import ArtifactError, UnsupportedModelError
from kvshrink.eval.report import plots
from kvshrink.fit.source import OnDisk
from kvshrink.identity import difference
from kvshrink.methods import name_of
from kvshrink.methods._roles import Method
from kvshrink.methods._stats import LayerShape
from kvshrink.methods.artifact import Artifact
from kvshrink.store.alike import merged
from kvshrink.store.bytes import human

LENGTHS = (8192, 32768, 131072)


def inspect(
    model: ModelOption = "reference",
    artifact: Annotated[Path | None, typer.Option(help="A fitted artifact instead of --method.")] = None,
    method: SpecOption = None,
    keep: KeepOption = None,
    bits: BitsOption = None,
    out: Annotated[Path, typer.Option(help="The picture of singular values.")] = Path("spectra.png"),
    json: JsonOption = False,
) -> None:
    """Bytes per token and at 8k, 32k and 128k tokens, full and shrunken, per layer; singular values as a PNG.

    With an artifact the singular values are those of the calibration's keys and values, else those of the weights.
    """
    quiet()
    refuse_beside(artifact, method=method, keep=keep, bits=bits)
    check_picture(out)
    fitted = Artifact.from_pretrained(artifact) if artifact else None
    chosen = fitted.method if fitted else one_method(method or "cskv", keep, bits)
    source = OnDisk(model_name(model))
    shapes, weights = _layers(source, spectra=fitted is None)
    if not shapes:
        raise UnsupportedModelError(f"{model} has no full-attention layer: there is nothing to shrink.")
    chosen = chosen.resolve_auto(list(shapes.values()), source.device)
    if fitted and (other := difference(fitted.model.get("identity"), source.identity(), f"the artifact {artifact}")):
        made_for = fitted.model.get("name", "another model")
        raise ArtifactError(
            f"the artifact was fitted on {made_for}, not on {model}: of this one {other}. Pass that model by --model."
        )
    if fitted and any(f"{side}_spectrum" not in t for t in fitted.layers.values() for side in ("key", "value")):
        raise ArtifactError(f"the artifact {artifact} has no singular values. Fit it again.")
    rows = [_row(i, shape, chosen, fitted) for i, shape in shapes.items()]
    head = ("layer", "method", "B/token full / body", "of full", *(f"{n // 1024}k full / held" for n in LENGTHS))
    lines = [*merged((r["layer"], _cells(r)) for r in rows), ["all", *_cells(_total(rows))]]
    print_table(head, lines, f"{model}, {name_of(chosen)}, one sequence")
    if fused := _fused(chosen, shapes, fitted):
        console.print(f"fused kernel on this machine: {', '.join(fused)}")
    spectra = _fitted_spectra(fitted) if fitted else weights
    what = "keys and values on the calibration text, centred" if fitted else "key and value projection weights"
    if spectra:
        plots.spectra(spectra, out, f"Singular values of {what}: {Path(model).name}")
    if fitted:
        console.print(f"fitted tensors: {human(fitted.nbytes)}, once per model, not per sequence")
    shown = f"wrote {out}" if spectra else "no picture: the key and value weights of this model are not known by name"
    console.print(shown)
    if json:
        print_json(
            {"model": model, "method": name_of(chosen), "settings": chosen.settings(), "fused": fused, "layers": rows}
        )


def _fused(method: Method, shapes: dict[int, LayerShape], artifact: Artifact | None) -> list[str]:
    """Whether a kernel reads what the method stores, or why none does; of a method to be fitted only once it is."""
    if method.needs_fit and artifact is None:
        return []
    fitted = {i: artifact.layers[i] if artifact else {} for i in shapes}
    alone = {i: shape for i, shape in shapes.items() if not method.stores_delta(fitted[i])}
    pairs = {i: method.codecs(shape, fitted[i]) for i, shape in alone.items()}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = {str(kernel_for(pair, shapes[i], method.page, device)): None for i, pair in pairs.items() if pair}
    return list(found)


def _layers(source: OnDisk, spectra: bool):
    """({layer: shape}, {layer: (key, value singular values)}) of the layers that a method would shrink."""
    shapes, values = {}, {}
    for i, info in enumerate(layers_of(source.model)):
        if not info.compressed:
            continue
        with source.layer(i):
            shapes[i] = shape_of(info)
            if spectra and (pair := key_value_weights(info.module)) is not None:
                values[i] = tuple(torch.linalg.svdvals(w.detach().float()).numpy() for w in pair)
    return shapes, values


def _row(index: int, shape: LayerShape, method: Method, artifact: Artifact | None) -> dict:
    tensors = artifact.layers[index] if artifact else {}
    row: dict = {"layer": index, "method": name_of(method), "full_per_token": shape.token_bytes}
    row["body_per_token"] = method.bits_per_token(shape, tensors) / 8
    for n in LENGTHS:
        row[str(n)] = [n * shape.token_bytes, method.layer_bytes(shape, tensors, n)]
    return row


def _total(rows: list[dict]) -> dict:
    keys = [k for k in rows[0] if k not in ("layer", "method")]
    total: dict = {"layer": "all", "method": rows[0]["method"]}
    for k in keys:
        lists = isinstance(rows[0][k], list)
        total[k] = [sum(r[k][i] for r in rows) for i in (0, 1)] if lists else sum(r[k] for r in rows)
    return total


def _cells(row: dict) -> tuple[str, ...]:
    body, full = row["body_per_token"], row["full_per_token"]
    lengths = (f"{human(a)} / {human(b)} ({100 * b / a:.1f} %)" for a, b in (row[str(n)] for n in LENGTHS))
    return (row["method"], f"{full} / {body:.0f}", f"{100 * body / full:.1f} %", *lengths)


def _fitted_spectra(artifact: Artifact) -> dict:
    return {i: (t["key_spectrum"].numpy(), t["value_spectrum"].numpy()) for i, t in artifact.layers.items()}

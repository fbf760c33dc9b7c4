"""What quantisers do to the real latents of a model: error by layer, and how many groups have values of one sign."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kvshrink.attach import attach
from kvshrink.attach.asking import key_value
from kvshrink.attach.factory import digest_of, shapes
from kvshrink.attach.families import decoder_layers
from kvshrink.errors import EvalError
from kvshrink.eval.run.layers import relative
from kvshrink.fit.layerwise import LayerRunner
from kvshrink.fit.source import InMemory
from kvshrink.methods._codecs.basis import BasisCodec
from kvshrink.methods._packing import Affine
from kvshrink.methods.artifact import Artifact
from kvshrink.shapes import Float
from recipes.cskv_paper.lab import Lab
from recipes.cskv_paper.official_quantiser import by_group, fake_quantise, one_sign, plain_bits

OFFICIAL, UNCLAMPED, OURS = "official formula", "the same, zero not clamped", "ours"
SIDES = ("key", "value")
DOCUMENTS = 2


def latent_rows(lab: Lab, artifacts: Mapping[str, Artifact]) -> list[dict]:
    """A row per fitted CSKV with bits, layer and side, on held-out text. Errors are |x - x'| / |x|.

    latent: of the latents, by quantiser; rebuilt: of the keys before RoPE or values made of them; rank: of those made
    of the latents as they are.
    """
    if other := [label for label, a in artifacts.items() if not plain_bits(a)]:
        raise EvalError(f"{other[0]} does not store latents as affine codes. Use a fitted CSKV with bits and no codec.")
    texts = torch.cat(lab.documents[:DOCUMENTS])
    parts = {label: ("latents", digest_of(a), texts.tolist()) for label, a in artifacts.items()}
    missing = {label: a for label, a in artifacts.items() if not lab.knows(parts[label])}
    made = _measured(lab.model, missing, texts) if missing else {}
    return [
        {"label": label, **row}
        for label in artifacts
        for row in lab.recorded(parts[label], lambda label=label: {"rows": made[label]})["rows"]  # type: ignore[misc]
    ]


def _measured(model: Any, artifacts: Mapping[str, Artifact], texts: Tensor) -> dict[str, list[dict]]:
    runner = LayerRunner(InMemory(model), texts, 1)
    found: dict[str, list[dict]] = {label: [] for label in artifacts}
    attachment = attach(model)
    for i, shape in enumerate(shapes(attachment)):
        seen: list[tuple[Tensor, Tensor]] = []

        def watch(module: nn.Module, kwargs: dict, seen: list = seen) -> None:
            seen.append(key_value(module, kwargs))

        runner.run(i, decoder_layers(model)[i], watch, attachment.layers[i].module)
        if shape is None:
            continue
        sides = [torch.cat(x).float() for x in zip(*seen, strict=True)]
        for label, a in artifacts.items():
            fitted = {k: t.to(sides[0].device) for k, t in a.layers[i].items()}
            for name, codec, rows in zip(SIDES, a.method.codecs(shape, fitted) or (), sides, strict=True):
                found[label].append({"layer": i, "side": name, **_errors(codec, rows, a.method.page)})
    return found


def _errors(codec: Any, rows: Float[Tensor, "b h t d"], page: int) -> dict:
    assert isinstance(codec, BasisCodec)
    assert isinstance(codec.packing, Affine)
    rows = rows[:, :, : rows.shape[2] // page * page]
    packing, latent = codec.packing, codec.project(rows)
    bits = packing.bits
    quantised = {
        OFFICIAL: by_group(latent, packing, lambda x: fake_quantise(x, bits)),
        UNCLAMPED: by_group(latent, packing, lambda x: fake_quantise(x, bits, clamped=False)),
        OURS: packing.fake_quantize(latent),
    }
    heads = rows.shape[1]
    return {
        "one_sign": round(float(one_sign(packing.grouping.split(latent)).float().mean()), 6),
        "latent": {name: round(relative(latent, x), 6) for name, x in quantised.items()},
        "rebuilt": {name: round(relative(rows, codec.expand(x, heads)), 6) for name, x in quantised.items()},
        "rank": round(relative(rows, codec.expand(latent, heads)), 6),
    }

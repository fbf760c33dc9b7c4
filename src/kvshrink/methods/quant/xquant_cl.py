"""XQuant-CL: layers in pairs, the second stored as what it adds to the first. arXiv 2508.10395

The first layer of a pair is XQuant's, at `bits`. The second stores z - z' in `delta_bits`, with z its own input (or
latents) and z' what a read of the first one's page gives: the rounded one, so that errors do not add up. Inputs of
neighbouring layers are alike, since each adds little to the residual stream. Latents of two layers lie in two bases, so
z' is predicted in the second one's by the matrix of least squares between them on calibration text.

Departures: the paper adds up differences through all layers in a buffer as long as the text; a read of a pair decodes
two pages and holds no more than that. So only every second layer has fewer bits. Where a pair's layers differ in shape
or in kind, or a layer is left over, it is stored as a first one. Otherwise as `xquant`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor

from kvshrink.methods._codecs.basis import BasisCodec
from kvshrink.methods._codecs.packed import PackedCodec
from kvshrink.methods._packing import Packing
from kvshrink.methods._packing.base import Importance
from kvshrink.methods._roles import Codec, Fitted, Method, Stored
from kvshrink.methods._settings import one_of
from kvshrink.methods._stats import CalibrationStats, LayerShape, Probe
from kvshrink.methods.quant._input import InputCodec
from kvshrink.methods.quant.xquant import BITS, XQuant
from kvshrink.shapes import Bool, Float
from kvshrink.store.names import under

ROWS = "rows"  # of the calibration text, held until layers are paired
RIDGE = 1e-4  # of a latent's mean energy, added to all


@final
@dataclass(frozen=True, eq=False)
class DeltaCodec(Codec):
    """A codec's latents as differences from another layer's. first: how its pages are; predictor: into ours."""

    own: BasisCodec | InputCodec
    first: Packing
    predictor: Float[Tensor, "r r"] | None

    @property
    def site(self) -> Literal["k_pre", "k_post", "v"]:
        return self.own.site

    @property
    def metadata(self) -> frozenset[str]:
        return self.own.metadata

    @property
    def width(self) -> int:
        return self.own.width

    @property
    def joint(self) -> bool:
        return self.own.joint

    def to(self, device: torch.device) -> "DeltaCodec":
        predictor = None if self.predictor is None else self.predictor.to(device)
        return replace(self, own=self.own.to(device), predictor=predictor)

    def encode(
        self,
        rows: Float[Tensor, "b h t d"],
        valid: Bool[Tensor, "b t"] | None,
        importance: Importance = None,
        base: Stored | None = None,
    ) -> Stored:
        assert base is not None, "it is stored as a difference only"
        return self.own.packing.store(self.own.project(rows) - self._predicted(base), valid)

    def unpack(self, stored: Stored) -> Float[Tensor, "b G t r"]:
        base = under(stored, "base.")
        return self._predicted(base) + self.own.packing.load(stored)

    def sound(self, stored: Stored) -> bool:
        return self.own.packing.sound(stored)

    def expand(self, latent: Float[Tensor, "b H x r"], heads: int) -> Float[Tensor, "b h x d"]:
        return self.own.expand(latent, heads)

    def page_bytes(self) -> int:
        return self.own.page_bytes()

    def _predicted(self, base: Stored) -> Float[Tensor, "b G t r"]:
        latent = self.first.load(base)
        return latent if self.predictor is None else latent @ self.predictor


@final
@dataclass(frozen=True)
class XQuantCL(Method):
    """`bits`-bit codes of every first layer's input or latents, `delta_bits`-bit ones of every second one's difference.

    mode, group: as XQuant's.
    """

    bits: int = 4
    delta_bits: int = 2
    mode: Literal["auto", "input", "latent"] = "auto"
    group: int = 128

    needs_fit: ClassVar[bool] = True

    @property
    def samples(self) -> bool:
        return True

    def check(self) -> None:
        super().check()
        one_of("delta_bits", self.delta_bits, BITS)
        self._plain(False).check()

    def fit_layer(self, stats: CalibrationStats) -> dict[str, Tensor]:
        method, sample = self._plain(False), stats.sample
        assert sample is not None
        found = method.fit_layer(stats)
        if "down" in found:
            return found
        pair = method.codecs(stats.shape, found)
        for name, codec, x in zip(("key", "value"), pair, (sample.keys_pre_rope, sample.values), strict=True):
            assert isinstance(codec, BasisCodec)
            found[f"{name}_{ROWS}"] = codec.project(x.transpose(0, 1)[None])[0, 0].contiguous()
        return found

    def finish(
        self, layers: Mapping[int, Fitted], shapes: Mapping[int, LayerShape], probe: Probe | None
    ) -> tuple[dict[int, dict[str, Tensor]], dict[str, Any]]:
        found = {i: {k: t for k, t in fitted.items() if not k.endswith(ROWS)} for i, fitted in layers.items()}
        paired, order = [], sorted(layers)
        for first, second in zip(order[::2], order[1::2], strict=False):
            a, b = layers[first], layers[second]
            if shapes[first] != shapes[second] or ("down" in a) != ("down" in b):
                continue
            found[second]["stores_delta"] = torch.ones(1, dtype=torch.uint8)
            for name in () if "down" in a else (f"key_{ROWS}", f"value_{ROWS}"):
                found[second][name.replace(ROWS, "predictor")] = _predictor(a[name], b[name])
            paired.append([first, second])
        return found, {"pairs": paired}

    def apart(self, fitted: Fitted) -> str | None:
        delta = "may store a layer as what it adds to another" if not fitted or self.stores_delta(fitted) else None
        return delta or self._plain(False).apart(fitted)

    def stores_delta(self, fitted: Fitted) -> bool:
        return "stores_delta" in fitted

    def codecs(self, shape: LayerShape, fitted: Fitted) -> tuple[Codec, Codec]:
        second = self.stores_delta(fitted)
        key, value = self._plain(second).codecs(shape, fitted)
        if not second:
            return key, value
        assert isinstance(key, BasisCodec | InputCodec)
        assert isinstance(value, BasisCodec | InputCodec)
        first, _ = self._plain(False).codecs(shape, fitted)
        assert isinstance(first, PackedCodec)
        packing = first.packing
        predictors = fitted.get("key_predictor"), fitted.get("value_predictor")
        return DeltaCodec(key, packing, predictors[0]), DeltaCodec(value, packing, predictors[1])

    def bits_per_token(self, shape: LayerShape, fitted: Fitted) -> float:
        """Of a layer not yet fitted, the mean of a pair's."""
        both = [self._plain(second).bits_per_token(shape, fitted) for second in (False, True)]
        return both[self.stores_delta(fitted)] if fitted else sum(both) / 2

    def _plain(self, second: bool) -> XQuant:
        bits = self.delta_bits if second else self.bits
        return XQuant(window=self.window, sinks=self.sinks, bits=bits, mode=self.mode, group=self.group)


def _predictor(first: Float[Tensor, "m r"], second: Float[Tensor, "m r"]) -> Float[Tensor, "r r"]:
    """T of least |first T - second|^2, with a ridge."""
    x, y = first.double(), second.double()
    gram = x.T @ x
    ridge = float(gram.diagonal().mean()) * RIDGE
    found: Tensor = torch.linalg.solve(
        gram + ridge * torch.eye(len(gram), dtype=x.dtype, device=x.device), x.T @ y
    ).float()
    return found


METHOD = XQuantCL

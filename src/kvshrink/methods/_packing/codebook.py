"""Numbers as codes of a table of levels: x = level x scale + centre, with one scale a group.

The table may be any: Lloyd-Max levels, levels fitted to data (nuq), the 16 values of a 4-bit float, -1 and 1, -1, 0 and
1 (five codes in a byte). Levels are sorted; a number takes the nearest.

scale says what a group's scale is taken from:
"absmax"  the largest magnitude becomes the largest level
"rms"     the root of the mean square becomes 1
"mean"    the mean magnitude becomes 1
"range"   minimum and maximum become -1 and 1 (and there is a centre)
"one"     nothing is stored: numbers come in as multiples of levels
stored_as says how it is stored: float16, float8 (e4m3, clipped at 448), power (an 8-bit exponent, rounded up), or
nested (e4m3, times one float32 a page and group of heads).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, final

import torch
from torch import Tensor

from kvshrink.kernels.latents import Packed
from kvshrink.kernels.load import load
from kvshrink.kernels.nearest import nearest
from kvshrink.kernels.pack import pack, pack_trits, packed_bytes, trit_bytes, unpack, unpack_trits
from kvshrink.methods._packing.base import Importance, MovesSlots, Packing, Stored, checked, slots_of
from kvshrink.methods._packing.grouping import Axis, Grouping
from kvshrink.methods._settings import require
from kvshrink.shapes import Bool, Float, Int

Scale = Literal["absmax", "rms", "mean", "range", "one"]
StoredAs = Literal["float16", "float8", "power", "nested"]

FUSED = (1, 2, 3, 4)  # bits of codes that fused kernels read
E4M3 = 448.0  # the largest number of 8-bit floats with 3 bits of mantissa
TRITS = 3**5  # values of a byte of five codes
BIAS = 127  # of a stored exponent


@final
@dataclass(frozen=True, eq=False)
class Codebook(Packing, MovesSlots):
    """levels: 2, 3, 4, 8, 16 or 256 of them, ascending. clip: share of the scale that is used.

    read: what codes are read as, if not as the levels they were chosen by.
    """

    groups: int
    width: int
    page: int
    levels: Float[Tensor, " levels"]
    axis: Axis = "token"
    group: int = 64
    scale: Scale = "absmax"
    stored_as: StoredAs = "float16"
    clip: float = 1.0
    read: Float[Tensor, " levels"] | None = None

    @property
    def metadata(self) -> frozenset[str]:
        names = {"one": [], "range": ["scale", "centre"]}.get(self.scale, ["scale"])
        return frozenset(names + [f"{name}_top" for name in names if self.stored_as == "nested"])

    def __post_init__(self) -> None:
        ragged = self.axis == "token" and self.width % min(self.group, self.width)
        require(not (ragged and self.scale in ("rms", "mean")), f"group={self.group} of {self.width}", "Use a divisor.")

    @cached_property
    def grouping(self) -> Grouping:
        return Grouping(self.axis, self.width, self.page, self.group)

    @property
    def bits(self) -> int:
        """Of a code; 0: three levels, five codes in a byte."""
        return {2: 1, 3: 0, 4: 2, 8: 3, 16: 4, 256: 8}[len(self.levels)]

    def store(
        self, latent: Float[Tensor, "b G t r"], valid: Bool[Tensor, "b t"] | None, importance: Importance = None
    ) -> Stored:
        grouping = self.grouping
        rows = grouping.split(latent)
        real = grouping.real(valid, rows)
        scale, centre = self._scale_and_centre(rows, real)
        metadata = {**_stored(scale, "scale", self.stored_as), **_stored(centre, "centre", self.stored_as)}
        step, middle = _read(metadata, "scale", self.stored_as), _read(metadata, "centre", self.stored_as)
        if middle is not None:
            rows = rows - middle[..., None]
        if step is not None:
            rows = rows / step.where(step > 0, torch.ones_like(step))[..., None]
        if real is not None:
            rows = torch.where(real, rows, 0.0)
        if step is None:  # nothing else has looked at the numbers
            checked(rows)
        flat = grouping.pages(nearest(rows, self.levels)).flatten(3)
        codes = pack(flat, self.bits) if self.bits else pack_trits(flat)
        return {"codes": codes, **metadata}

    def load(self, stored: Stored) -> Float[Tensor, "b G t r"]:
        if (packed := self.packed(stored)) is not None:
            return load(packed)
        count = self.page * self.width
        codes = unpack(stored["codes"], self.bits) if self.bits else unpack_trits(stored["codes"], count)
        pages = self._table.to(codes.device)[codes.int()].unflatten(-1, (self.page, self.width))
        for name, change in (("scale", torch.mul), ("centre", torch.add)):
            if (metadata := _read(stored, name, self.stored_as)) is not None:
                pages = change(pages, self.grouping.spread(metadata))
        found: Tensor = pages.transpose(1, 2).flatten(2, 3)
        return found

    @property
    def drops(self) -> frozenset[type]:
        """What is over the tokens of a page: a channel's scale, and the one number of nested scales."""
        return frozenset({MovesSlots} if self.axis == "channel" or self.stored_as == "nested" else ())

    def moved(self, stored: Stored, index: Int[Tensor, "b G k"]) -> Stored:
        count, codes = self.page * self.width, stored["codes"]
        rows = (unpack(codes, self.bits) if self.bits else unpack_trits(codes, count)).unflatten(-1, (self.page, -1))
        flat = slots_of(rows, index).flatten(3)
        numbers = {k: slots_of(t, index) for k, t in stored.items() if k != "codes"}
        return {"codes": pack(flat, self.bits) if self.bits else pack_trits(flat), **numbers}

    def sound(self, stored: Stored) -> bool:
        return self.bits > 0 or bool((stored["codes"] < TRITS).all())

    @property
    def _table(self) -> Float[Tensor, " levels"]:
        """What codes are read as."""
        return self.levels if self.read is None else self.read

    def packed(self, stored: Stored) -> Packed | None:
        if (
            self.axis != "token"
            or self.stored_as != "float16"
            or self.scale in ("one", "range")
            or self.bits not in FUSED
        ):
            return None
        runs = ((self.bits, self.width),)
        return Packed("table", stored, self.width, self.page, runs, min(self.group, self.width), self._table)

    def page_bytes(self) -> int:
        count = self.page * self.width
        codes = packed_bytes(count, self.bits) if self.bits else trit_bytes(count)
        numbers = {"one": 0, "range": 2}.get(self.scale, 1)
        top = 4 * numbers if self.stored_as == "nested" else 0
        return self.groups * (codes + self.grouping.groups * numbers * (2 if self.stored_as == "float16" else 1) + top)

    def _scale_and_centre(self, rows: Tensor, real: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """(scale, centre) of groups, [..], before they are rounded to how they are stored."""
        if self.scale == "one":
            return None, None
        if self.scale == "range":
            low, high = (_ends(rows, real, sign) for sign in (-1.0, 1.0))
            return (high - low) / 2 * self.clip, (high + low) / 2
        sizes = rows.abs() if real is None else torch.where(real, rows, 0.0).abs()
        if self.scale == "absmax":
            return sizes.amax(-1) * (self.clip / float(self.levels[-1])), None
        there = rows.shape[-1] if real is None else real.sum(-1).clamp_min(1)
        if self.scale == "rms":
            return (sizes.square().sum(-1) / there).sqrt() * self.clip, None
        return sizes.sum(-1) / there * self.clip, None


def _ends(rows: Tensor, real: Tensor | None, sign: float) -> Tensor:
    """The largest of each group (sign 1) or the smallest (-1); 0 where nothing is real."""
    if real is None:
        return (rows * sign).amax(-1) * sign
    found = torch.where(real, rows * sign, -torch.inf).amax(-1)
    return torch.where(real.any(-1), found, 0.0) * sign


def _stored(metadata: Tensor | None, name: str, stored_as: StoredAs) -> dict[str, Tensor]:
    """Metadata as it is kept. Raises DataError on what cannot be."""
    if metadata is None:
        return {}
    if stored_as == "float16":
        return {name: checked(metadata.to(torch.float16))}
    checked(metadata)
    if stored_as == "float8":
        return {name: metadata.clamp(-E4M3, E4M3).to(torch.float8_e4m3fn).view(torch.uint8)}
    if stored_as == "power":
        exponent = torch.frexp(metadata).exponent - (torch.frexp(metadata).mantissa == 0.5).int()
        return {name: (exponent + BIAS).clamp(1, 255).where(metadata > 0, 0).to(torch.uint8)}
    flat = metadata.reshape(*metadata.shape[:3], -1).abs().amax(-1) / E4M3  # [b, p, G]
    over = flat.where(flat > 0, 1.0).reshape(*flat.shape, *[1] * (metadata.dim() - 3))
    return {name: (metadata / over).to(torch.float8_e4m3fn).view(torch.uint8), f"{name}_top": flat}


def _read(stored: Stored, name: str, stored_as: StoredAs) -> Tensor | None:
    """Metadata as numbers, float32."""
    metadata = stored.get(name)
    if metadata is None:
        return None
    if stored_as == "float16":
        return metadata.float()
    if stored_as == "power":
        return torch.ldexp((metadata > 0).float(), metadata.int() - BIAS)
    number = metadata.view(torch.float8_e4m3fn).float()
    if stored_as == "float8":
        return number
    top = stored[f"{name}_top"]
    return number * top.reshape(*top.shape, *[1] * (metadata.dim() - 3))

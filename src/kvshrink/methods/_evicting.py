"""What every method is that keeps the important tokens of each KV head and drops the others."""

from abc import abstractmethod
from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Tensor

from kvshrink.methods._codecs.headwise import HeadwiseCodec
from kvshrink.methods._packing import Packing, packing
from kvshrink.methods._policy import Budget, Scorer, Uniform
from kvshrink.methods._quantiser import CONSTANT, beside_constant
from kvshrink.methods._roles import Codec, Fitted, Method
from kvshrink.methods._settings import one_of, require
from kvshrink.methods._stats import LayerShape
from kvshrink.store.growth import LANE_INDEX

SLOT_INDEX, PAGE_COUNT = 8, 4  # bytes of a slot's column and importance; of how many pages a head holds


@dataclass(frozen=True)
class Evicting(Method):
    """Of the tokens that leave the window, each KV head keeps the most important ones, as keys after RoPE and values.

    ratio: share of these tokens that is kept, in whole pages of 32. bits: of what is kept, with a scale and a minimum
    for each token and 64 channels; None: the model's dtype. visual_ratio: share that is kept of the tokens that came
    from images or videos, which then compete among themselves; None: all tokens compete.
    """

    ratio: float = 0.25
    bits: int | None = None
    visual_ratio: float | None = field(default=None, kw_only=True)

    drops_tokens: ClassVar[bool] = True
    budget_setting: ClassVar[str] = "ratio"

    @property
    @abstractmethod
    def scorer(self) -> Scorer: ...

    @property
    def token_budget(self) -> Budget:
        return Uniform(self.ratio)

    @property
    def visual_budget(self) -> Budget | None:
        return None if self.visual_ratio is None else self.of_images(self.visual_ratio).token_budget

    def of_images(self, ratio: float) -> "Evicting":
        """The same method as it treats tokens of images."""
        return replace(self, ratio=ratio, visual_ratio=None)

    def images_beside(self, shape: LayerShape, fitted: Fitted, pages: int, visual: int) -> int:
        """Bytes of what is kept of so many pages of images, and of what index bytes change by."""
        other = self.of_images(self.visual_ratio or 1.0)
        index = self.index_bytes(shape, pages - visual) - self.index_bytes(shape, pages)
        once = shape.heads * PAGE_COUNT * (pages > visual)
        return other.body_bytes(shape, fitted, visual) + index + other.index_bytes(shape, visual) - once

    def check(self) -> None:
        super().check()
        own = self.visual_ratio
        require(own is None or 0 < own <= 1, f"visual_ratio={own}", "Use a share of tokens above 0, up to 1.")
        require(0 < self.ratio <= 1, f"ratio={self.ratio}", "Use a share of tokens above 0, up to 1.")
        one_of("bits", self.bits, (None, 8, 4, 2))

    def budget_values(self, shape: LayerShape, tokens: int) -> list[float]:
        left = max(1, (tokens - self.window) // self.page)
        return [n / left for n in range(1, left + 1)]

    def lanes(self, shape: LayerShape) -> int:
        return shape.heads

    def codecs(self, shape: LayerShape, fitted: Fitted) -> tuple[Codec, Codec]:
        own, constant = self._packing(shape), fitted.get(CONSTANT)
        keys = HeadwiseCodec("k_post", own) if constant is None else beside_constant(own, None, constant)
        return keys, HeadwiseCodec("v", own)

    def without_constant(self, fitted: Fitted, constant: Tensor) -> Fitted | None:
        return {**fitted, CONSTANT: constant}

    def _packing(self, shape: LayerShape) -> Packing:
        return packing(shape.heads, shape.head_dim, self.page, self.bits, "token", 64, shape.dtype)

    def body_bytes(self, shape: LayerShape, fitted: Fitted, pages: int) -> int:
        # sinks are not among the candidates: where all tokens are kept, the last page is not full
        return self.token_budget.pages(pages, shape.heads) * 2 * self._packing(shape).page_bytes() // shape.heads

    def layer_bytes(self, shape: LayerShape, fitted: Fitted, tokens: int, batch: int = 1) -> int:
        held = super().layer_bytes(shape, fitted, tokens, batch)
        gone = max(0, tokens - self.window) // self.page * self.page
        return held + (batch * shape.heads * (tokens - gone) * 4 if self.scorer.running else 0)

    def index_bytes(self, shape: LayerShape, pages: int) -> int:
        own = self.token_budget.pages(pages, shape.heads)
        return own * (LANE_INDEX + self.page * SLOT_INDEX) + shape.heads * PAGE_COUNT * (own > 0)

"""What every method is that keeps the important tokens of each KV head and drops the others."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor

from kvshrink.methods._budgets import Budget, Shared, Uniform
from kvshrink.methods._codecs.headwise import HeadwiseCodec
from kvshrink.methods._packing import Packing, packing
from kvshrink.methods._policy import Policy, Schedule, Scorer
from kvshrink.methods._quantiser import CONSTANT, beside_constant
from kvshrink.methods._roles import Codec, Fitted, Method
from kvshrink.methods._settings import EXACT, one_of, require
from kvshrink.methods._stats import LayerShape
from kvshrink.methods._tier import Tier
from kvshrink.store.growth import LANE_INDEX

NOTHING: Fitted = {}
SLOT_INDEX, PAGE_COUNT = 8, 4  # bytes of a slot's column and importance; of how many pages a head holds


@dataclass(frozen=True)
class Evicting(Method):
    """Of the tokens that leave the window, each KV head keeps the most important ones, as keys after RoPE and values.

    ratio: share of these tokens that is kept, in whole pages of 32. bits: of what is kept, with a scale and a minimum
    for each token and 64 channels; None: the model's dtype. visual_ratio: share that is kept of the tokens that came
    from images or videos, which then compete among themselves; None: all tokens compete.
    schedule: "page": the share holds at any length; "prompt": tokens are dropped in prompts alone, and what is decoded
    stays until the next one; a number: while decoding, once a head holds so many more than its share.
    protect: so many first tokens (a system prompt) always stay. most: tokens that a head holds at most; None: any
    number. floor: heads of a layer compete for its tokens, and each has this part of an even share at least (AdaKV,
    arXiv 2407.11550); None: all heads keep as many. merge: the value of a token that is dropped joins that of the token
    that stays with the nearest key (of what leaves the window in one step), in the mean; else it is gone.
    """

    ratio: float = 0.25
    bits: int | None = None
    visual_ratio: float | None = field(default=None, kw_only=True)
    schedule: Schedule = field(default="page", kw_only=True)
    protect: int = field(default=0, kw_only=True)
    most: int | None = field(default=None, kw_only=True)
    floor: float | None = field(default=None, kw_only=True)
    merge: bool = field(default=False, kw_only=True)

    drops_tokens: ClassVar[bool] = True
    budget_setting: ClassVar[str] = "ratio"
    by_head: ClassVar[bool] = True  # whether each KV head chooses its own tokens
    counted_by: ClassVar[str | None] = None  # what alone says how many tokens a head keeps, if `ratio` is not split up
    matches: ClassVar[bool] = False  # whether what stays is changed until it attends as all did
    by_class: ClassVar[bool] = False  # whether heads differ in how many they keep by what a fit said of them

    @abstractmethod
    def scorer(self, fitted: Fitted) -> Scorer:
        """By what tokens are ranked."""

    def budget(self, ratio: float, fitted: Fitted) -> Budget:
        """Of so large a share. fitted: nothing where bytes are promised before a fit."""
        return Uniform(ratio, self.most_pages) if self.floor is None else Shared(ratio, self.most_pages, self.floor)

    @property
    def most_pages(self) -> int | None:
        return None if self.most is None else max(1, self.most // self.page)

    def policy(self, shape: LayerShape, fitted: Fitted) -> Policy:
        shown = None if self.visual_ratio is None else self.budget(self.visual_ratio, fitted)
        scorer, own = self.scorer(fitted), self.budget(self.ratio, fitted)
        return Policy(scorer, own, shown, self.schedule, self.protect, self.merge, self.matches)

    def of_images(self, ratio: float) -> "Evicting":
        """The same method as it treats tokens of images."""
        return replace(self, ratio=ratio, visual_ratio=None)

    def images_beside(self, shape: LayerShape, fitted: Fitted, pages: int, visual: int) -> int:
        """Bytes of what is kept of so many pages of images, and of what index bytes change by."""
        other = self.of_images(self.visual_ratio or 1.0)
        index = self.index_bytes(shape, pages - visual, fitted) - self.index_bytes(shape, pages, fitted)
        once = self.lanes(shape) * PAGE_COUNT * (pages > visual)
        return other.body_bytes(shape, fitted, visual) + index + other.index_bytes(shape, visual, fitted) - once

    def check(self) -> None:
        super().check()
        own = self.visual_ratio
        alone = self.counted_by is None or (self.most, self.floor, own) == (None, None, None)
        require(alone, f"{self.counted_by} beside most, floor or visual_ratio", "Leave them out.")
        require(own is None or 0 < own <= 1, f"visual_ratio={own}", "Use a share of tokens above 0, up to 1.")
        require(0 < self.ratio <= 1, f"ratio={self.ratio}", "Use a share of tokens above 0, up to 1.")
        one_of("bits", self.bits, (None, 8, 4, 2))
        known = self.schedule in ("page", "prompt") or (isinstance(self.schedule, int) and self.schedule >= 1)
        require(known, f"schedule={self.schedule!r}", "Use 'page', 'prompt' or a number of tokens.")
        require(0 <= self.protect <= EXACT, f"protect={self.protect}", f"Use 0 to {EXACT} tokens.")
        least = f"Use at least {self.page} tokens, or None."
        require(self.floor is None or 0 <= self.floor <= 1, f"floor={self.floor}", "Use a share from 0 to 1.")
        require(self.most is None or self.most >= self.page, f"most={self.most}", least)

    def budget_values(self, shape: LayerShape, tokens: int) -> list[float]:
        left = max(1, (tokens - self.window) // self.page)
        return [n / left for n in range(1, left + 1)]

    @classmethod
    def search_space(cls, shapes: Sequence[LayerShape]) -> Mapping[str, Sequence[Any]]:
        return {"bits": (None, 8, 4)}

    def lanes(self, shape: LayerShape, tiers: Sequence[Tier] = ()) -> int:
        return shape.heads if self.by_head else 1

    def codecs(self, shape: LayerShape, fitted: Fitted) -> tuple[Codec, Codec]:
        own, constant = self._packing(shape), fitted.get(CONSTANT)
        keys = HeadwiseCodec("k_post", own) if constant is None else beside_constant(own, None, constant)
        return keys, HeadwiseCodec("v", own)

    def without_constant(self, fitted: Fitted, constant: Tensor) -> Fitted | None:
        return {**fitted, CONSTANT: constant}

    def _packing(self, shape: LayerShape) -> Packing:
        return packing(shape.heads, shape.head_dim, self.page, self.bits, "token", 64, shape.dtype)

    def pages_kept(self, lanes: int, pages: int, fitted: Fitted = NOTHING) -> int:
        """Pages of all lanes that stay of so many that left. What is protected stays anyway; sinks are not chosen."""
        own = self.budget(self.ratio, fitted).pages(pages, lanes, self.page)
        least = min(pages, -(-max(0, self.protect - self.sinks) // self.page))
        most = -(-max(0, pages * self.page - self.sinks) // self.page)
        return min(max(own, least * lanes), most * lanes)

    def body_bytes(self, shape: LayerShape, fitted: Fitted, pages: int) -> int:
        # sinks are not among the candidates: where all tokens are kept, the last page is not full
        return (
            self.pages_kept(self.lanes(shape), pages, fitted)
            * 2
            * self._packing(shape).page_bytes()
            // self.lanes(shape)
        )

    def layer_bytes(self, shape: LayerShape, fitted: Fitted, tokens: int, batch: int = 1) -> int:
        held = super().layer_bytes(shape, fitted, tokens, batch)
        return held + batch * score_bytes(self, self.scorer({}), shape.heads, tokens)

    def index_bytes(self, shape: LayerShape, pages: int, fitted: Fitted) -> int:
        lanes = self.lanes(shape)
        return chosen_index(self.pages_kept(lanes, pages, fitted), lanes, self.page, pages)


def score_bytes(method: Method, scorer: Scorer, heads: int, tokens: int) -> int:
    """Bytes of the importance of a window's tokens, where they have one."""
    gone = max(0, tokens - method.window) // method.page * method.page
    return heads * (tokens - gone) * 4 if scorer.remembers else 0


def chosen_index(pages: int, lanes: int, page: int, left: int) -> int:
    """Bytes of what says where so many pages of all lanes are, and which tokens they hold; left: pages that came."""
    return pages * (LANE_INDEX + page * SLOT_INDEX) + lanes * PAGE_COUNT * (left > 0)

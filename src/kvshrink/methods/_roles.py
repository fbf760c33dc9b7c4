"""What a method is made of. A method file fills these roles; the cache knows only the roles.

Abstract or final: a role is never instantiated, a method is never subclassed. Methods are frozen: settings, plus
tensors fitted once. Per-sequence state lives in the cache layer. A role joins this file with its first method.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from kvshrink.kernels.records import record_bytes
from kvshrink.methods._codec import Codec as Codec
from kvshrink.methods._packing.base import Stored as Stored
from kvshrink.methods._policy import Policy
from kvshrink.methods._settings import EXACT, require
from kvshrink.methods._stats import CalibrationStats, LayerShape, Probe
from kvshrink.methods._tier import Tier
from kvshrink.methods._training import Training
from kvshrink.methods._types import Settings, check_finite, check_types
from kvshrink.methods._window import WindowForm
from kvshrink.store.growth import LANE_INDEX, PAGE_INDEX, slots_for

Fitted = Mapping[str, Tensor]  # what `fit` learnt about one layer


@dataclass(frozen=True)
class Method(metaclass=Settings):
    """A way to shrink the cache. The first `sinks` and the last `window` tokens of a sequence stay apart. Tokens leave
    the window in pages of `page`; `codecs` says what becomes of them, None that they are dropped, and `tiers` what
    becomes of pages that grow old: what a tier cannot hold any more moves on to the next one.
    window_bits: 8 holds the window at 8 bits, a scale per token and head; None: exactly; "auto": at 8 where a method
                 shares out a byte budget, of which an exact window would be much.
    visual: how pages of nothing but tokens of images or videos are stored, as "turboquant:bits=2"; None: as all."""

    window: int = 32
    sinks: int = 4
    window_bits: int | Literal["auto"] | None = field(default="auto", kw_only=True)
    visual: str | None = field(default=None, kw_only=True)

    page: ClassVar[int] = 32
    needs_fit: ClassVar[bool] = False
    drops_tokens: ClassVar[bool] = False
    two_widths: ClassVar[bool] = False  # whether rows of keys and of values may differ in width (MLA)
    budget_setting: ClassVar[str | None] = None  # the setting that a byte budget moves
    byte_neutral: ClassVar[frozenset[str]] = frozenset()  # settings on which no byte depends

    def budget_values(self, shape: LayerShape, tokens: int) -> Sequence[Any]:
        """Values of the budget setting for a cache of `tokens` tokens, the one with the fewest bytes first."""
        return ()

    @classmethod
    def search_space(cls, shapes: Sequence[LayerShape]) -> Mapping[str, Sequence[Any]]:
        """{setting: values that a plan tries}; window and sinks are the plan's unless named. shapes: of all layers."""
        return {}

    def resolve_auto(self, shapes: Sequence[LayerShape], device: torch.device) -> "Method":
        """The method with what depends on the device decided, before a fit, so that an artifact means the same on
        every machine. shapes: of the layers that are compressed."""
        return self

    @abstractmethod
    def codecs(self, shape: LayerShape, fitted: Fitted) -> tuple[Codec, Codec] | None:
        """Key codec and value codec of a layer of this shape."""

    def tiers(self, shape: LayerShape, fitted: Fitted) -> tuple[Tier, ...]:
        """Ages of the body's pages, the youngest first, whose codecs are `codecs`."""
        return (Tier(self.codecs(shape, fitted)),)

    def policy(self, shape: LayerShape, fitted: Fitted) -> Policy:
        """Which of a layer's tokens stay, and what they are ranked by where something depends on it."""
        return Policy()

    def chooses_by(self, shape: LayerShape) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the fitted tensors that `policy` reads, -1 for any size."""
        return {}

    def at_layer(self, index: int, count: int) -> "Method":
        """The method as it is in the index-th of so many compressed layers."""
        return self

    def lanes(self, shape: LayerShape, tiers: Sequence[Tier]) -> int:
        """Groups of neighbouring KV heads whose tokens come and go by themselves."""
        return 1

    def lane_groups(self, shape: LayerShape) -> int:
        """Groups of neighbouring KV heads stored each by itself, as known before a fit: the most lanes of a row."""
        return 1

    def stores_delta(self, fitted: Fitted) -> bool:
        """Whether a layer is stored as what it adds to the compressed layer before it."""
        return False

    def without_constant(self, fitted: Fitted, constant: Tensor) -> Fitted | None:
        """What a layer's codecs are made of where a constant part [h, d] of its keys before RoPE is kept apart, and
        only what varies is stored; None: the method has no such form."""
        return None

    def apart(self, fitted: Fitted) -> str | None:
        """Why rows through a layer's codecs are not yet what a cache holds of them, or reads; None: they are.
        fitted: empty where nothing is fitted yet; then of what the settings allow."""
        return "drops tokens" if self.drops_tokens else None

    def fit_layer(self, stats: CalibrationStats) -> dict[str, Tensor]:
        """Tensors of one layer from its calibration statistics."""
        return {}

    @property
    def samples(self) -> bool:
        """Whether `fit_layer` needs `stats.sample`: rows of the calibration text as they are."""
        return False

    @property
    def probes(self) -> bool:
        """Whether `finish` needs a Probe, and so the whole model in memory."""
        return False

    def splits(self) -> Mapping[float, "Method"]:
        """Shares of a layer's channels that keys may get, each with the method that gives them so many: a fit takes,
        layer by layer, the one whose attention output is nearest. Empty: the settings say it."""
        return {}

    def training(self) -> Training | None:
        """How the bases of `fit_layer` are trained after it; None: they stay as they are."""
        return None

    def finish(
        self, layers: Mapping[int, Fitted], shapes: Mapping[int, LayerShape], probe: Probe | None
    ) -> tuple[dict[int, dict[str, Tensor]], dict[str, Any]]:
        """Once all are fitted: what they share, as one byte budget. (tensors, record; "layers" in it joins theirs)."""
        return {i: dict(fitted) for i, fitted in layers.items()}, {}

    def at_ratio(self, ratio: float) -> "Method | None":
        """The method at a lower share of channels, whose tensors are the leading components of this one's; None: it
        has no components that could be left out. Raises SettingError where it cannot be this share of them."""
        return None

    def cut(self, fitted: Fitted, record: Mapping[str, Any]) -> dict[str, Tensor]:
        """A layer's tensors at this method's share of channels from those of one fitted at a higher share, of which
        this is `at_ratio`. record: what the fit says of the layer (`Artifact.provenance`)."""
        raise NotImplementedError(f"{type(self).__name__} has no components to leave out")

    def check(self) -> None:
        """Raise SettingError on settings that no model could use."""
        check_types(type(self), {f.name: getattr(self, f.name) for f in fields(self)})
        require(self.window >= 1, f"window={self.window}", "Use at least 1 token.")
        require(self.sinks >= 0, f"sinks={self.sinks}", "Use 0 or more tokens.")
        require(self.window_bits in (None, 8, "auto"), f"window_bits={self.window_bits!r}", "Use 8, None or 'auto'.")
        what = f"visual={self.visual!r:.60} of a method that drops tokens"
        require(self.visual is None or not self.drops_tokens, what, "Leave it out, or use visual_ratio.")
        for name in ("window", "sinks"):
            require(getattr(self, name) <= EXACT, f"{name}={getattr(self, name)}", f"Use at most {EXACT} tokens.")

    def __post_init__(self) -> None:
        self.check()
        check_finite(self.settings())

    def settings(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def bits_per_token(self, shape: LayerShape, fitted: Fitted) -> float:
        """Bits of a token's key and value in the body's youngest tier, scales included. 0 if dropped."""
        pair = self.codecs(shape, fitted)
        return 0.0 if pair is None else sum(c.page_bytes() for c in pair) * 8 / self.page

    def layer_bytes(self, shape: LayerShape, fitted: Fitted, tokens: int, batch: int = 1) -> int:
        """Bytes a layer holds after one prefill of `tokens` unpadded tokens. The cache must hold exactly this."""
        room, pages = self.window + self.page, max(0, tokens - self.window) // self.page
        form = self.window_form(shape) if pages * self.page >= self.sinks else WindowForm(None, shape)
        exact = form.token_bytes  # until the window has given all sinks, it is exact as they are
        if tokens < room:
            return batch * min(room, slots_for(tokens)) * exact
        sinks = self.sinks * (shape.token_bytes + 4)  # and a 4-byte column each
        index = self.index_bytes(shape, pages, fitted)
        return batch * (room * exact + sinks + self.body_bytes(shape, fitted, pages) + index)

    def window_form(self, shape: LayerShape) -> WindowForm:
        auto = 8 if self.rounds_window and not shape.swamped and shape.one_width else None
        return WindowForm(auto if self.window_bits == "auto" else self.window_bits, shape)

    @property
    def rounds_window(self) -> bool:
        """Whether window_bits="auto" is 8, where keys allow it."""
        return False

    def pages_held(self, pages: int) -> int:
        """Pages of the body of one sequence, of so many that left the window."""
        return pages

    def index_bytes(self, shape: LayerShape, pages: int, fitted: Fitted) -> int:
        """Bytes of what says where the body's pages are and which tokens they hold."""
        return self.pages_held(pages) * (PAGE_INDEX + LANE_INDEX)

    def body_bytes(self, shape: LayerShape, fitted: Fitted, pages: int) -> int:
        """Bytes of the body of one sequence, after so many pages left the window."""
        return pages * record_bytes(int(self.bits_per_token(shape, fitted) * self.page / 8))

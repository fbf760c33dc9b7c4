"""Tokens x bits x ranks: one method chooses tokens, another stores those that stay. "snapkv:ratio=0.25 +
cskv:keep=0.2". No paper's: a baseline for those that drop and quantise at once.

What leaves the window is chosen while it is exact, and only what stays is encoded, so that any codec may follow. Their
shares of bytes multiply; index bytes, 8 a token and lane, are counted. Where all KV heads of a layer share a latent
they keep the same tokens, by the mean of their importance.

schedule: "prompt" by default: tokens are dropped in prompts, and what is decoded stays, for good where stored tokens
cannot move. Codecs whose tokens can (turboquant, rtn with key_axis="token" and others that scale each token; cskv
without bits) take "page" and numbers too. With demote what is decoded is not chosen: it is in the store.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import gcd
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from kvshrink import methods
from kvshrink.errors import SettingError
from kvshrink.kernels.records import record_bytes
from kvshrink.methods._abilities import MovesSlots, find
from kvshrink.methods._evicting import Evicting, chosen_index, score_bytes
from kvshrink.methods._policy import Policy, Schedule
from kvshrink.methods._roles import Codec, Fitted, Method
from kvshrink.methods._settings import require
from kvshrink.methods._stats import SOME, CalibrationStats, LayerShape, Probe
from kvshrink.methods._tier import Tier
from kvshrink.methods._training import Training
from kvshrink.methods.text import parse_settings, text_of
from kvshrink.store.names import under

OURS = ("window", "sinks", "window_bits", "schedule", "demote")  # settings of the whole
PREFIX = "tokens."  # of what the chooser learns


@final
@dataclass(frozen=True)
class Compose(Method):
    """tokens: a method that chooses tokens, and its settings, as text; store: the one that stores them. ratio: in place
    of the chooser's; None: as `tokens` says.

    demote: nothing is forgotten. `store` holds every token, and those that are chosen are held by the chooser too, in
    the model's dtype or its `bits`, where attention reads them; a chosen one that loses its place is read from the
    store. While decoding a byte for each token and lane says which is read where, beside the bytes that are promised.
    """

    tokens: str = "snapkv"
    store: str = "turboquant:bits=4"
    ratio: float | None = None
    demote: bool = False
    schedule: Schedule = field(default="prompt", kw_only=True)

    budget_setting: ClassVar[str] = "ratio"

    @property
    def drops_tokens(self) -> bool:  # type: ignore[override]
        return not self.demote

    def apart(self, fitted: Fitted) -> str | None:
        return "holds some tokens twice" if self.demote else super().apart(fitted)

    @classmethod
    def search_space(cls, shapes: Sequence[LayerShape]) -> Mapping[str, Sequence[Any]]:
        stores = ("turboquant:bits=4", "turboquant:bits=3", "turboquant:bits=2")
        return {"tokens": ("snapkv", "kvzip", "expected_attention"), "store": stores, "demote": (False, True)}

    def check(self) -> None:
        super().check()
        chooser, store = self.chooser, self.storage
        require(isinstance(chooser, Evicting), f"tokens={self.tokens!r}", "Name a method that chooses tokens: snapkv.")
        delta = type(store).stores_delta is not Method.stores_delta
        other = store.drops_tokens or delta or store.policy(SOME, {}).scorer is not None
        require(not other, f"store={self.store!r}", "Name a method that stores each token by itself: cskv, turboquant.")
        shown = store.visual is not None or chooser.visual_ratio is not None or self.visual is not None
        require(
            not shown, "visual= or visual_ratio= in a composition", "Images are stored as text there. Leave it out."
        )
        most = chooser.most
        require(
            most is None or most >= self.page, f"most={most}", f"Use at least {self.page} tokens, a page of the store."
        )
        require(self.ratio is None or 0 < self.ratio <= 1, f"ratio={self.ratio}", "Use a share above 0, up to 1.")

    # --- the two ---

    @property
    def chooser(self) -> Evicting:
        found = _built(self.tokens)
        changes: dict[str, Any] = {"window": self.window, "sinks": self.sinks}
        if not isinstance(found, Evicting):
            return replace(found, **changes)  # type: ignore[return-value] # `check` refuses it
        changes |= {"schedule": self.schedule} | ({} if self.ratio is None else {"ratio": self.ratio})
        twice = self.demote and (found.merge or found.matches)
        require(not twice, "demote with what stands for dropped tokens too", "They would count twice. Leave one out.")
        own = replace(found, **changes)
        object.__setattr__(own, "page", self.storage.page)  # whole pages of the store, which a class cannot know
        return own

    @property
    def storage(self) -> Method:
        return replace(_built(self.store), window=self.window, sinks=self.sinks, window_bits=self.window_bits)

    @property
    def needs_fit(self) -> bool:  # type: ignore[override] # what is a constant of others depends on the parts here
        return self.chooser.needs_fit or self.storage.needs_fit

    @property
    def page(self) -> int:  # type: ignore[override]
        return self.storage.page

    def resolve_auto(self, shapes: Sequence[LayerShape], device: torch.device) -> "Compose":
        found = self.storage.resolve_auto(shapes, device)
        return self if found == self.storage else replace(self, store=text_of(found, OURS))

    def at_layer(self, index: int, count: int) -> "Compose":
        found = self.chooser.at_layer(index, count)
        own = isinstance(found, Evicting) and found.ratio != self.chooser.ratio
        return replace(self, ratio=found.ratio) if own and isinstance(found, Evicting) else self

    # --- which tokens ---

    def policy(self, shape: LayerShape, fitted: Fitted) -> Policy:
        return self.chooser.policy(shape, under(fitted, PREFIX))._replace(demotes=self.demote)

    def chooses_by(self, shape: LayerShape) -> Mapping[str, tuple[int, ...]]:
        return {f"{PREFIX}{k}": size for k, size in self.chooser.chooses_by(shape).items()}

    def budget_values(self, shape: LayerShape, tokens: int) -> list[float]:
        return self.chooser.budget_values(shape, tokens)

    def lanes(self, shape: LayerShape, tiers: Sequence[Tier] = ()) -> int:
        groups = (shape.heads if self.demote else self.storage.lane_groups(shape)) if self.chooser.by_head else 1
        if not tiers:
            return groups
        pair = tiers[-1].codecs
        if len(tiers) > 1 + self.demote or pair is None or pair[0].reads(2**20) is not None:
            raise SettingError(f"store={self.store!r} treats tokens by their age or reads some. Name another method.")
        if self.demote:
            return shape.heads if self.chooser.by_head else 1
        if self.schedule != "prompt" and not all(find(c, MovesSlots) for c in pair):
            raise SettingError(
                f"schedule={self.schedule!r} drops stored tokens, which pages of {self.store!r} cannot: their scales "
                "are over several tokens. Use schedule='prompt'."
            )
        return self._check_classes(shape, gcd(groups, *map(_groups, pair)))

    def _check_classes(self, shape: LayerShape, lanes: int) -> int:
        if self.chooser.by_class and lanes < shape.heads:
            raise SettingError(
                f"{self.tokens!r} has heads that keep different tokens, but those of a layer share what {self.store!r} "
                "stores. Use turboquant or rtn, or spectral:speed=apart."
            )
        return lanes

    # --- how they are stored ---

    def codecs(self, shape: LayerShape, fitted: Fitted) -> tuple[Codec, Codec] | None:
        return self.chooser.codecs(shape, {}) if self.demote else self.storage.codecs(shape, _rest(fitted))

    def tiers(self, shape: LayerShape, fitted: Fitted) -> tuple[Tier, ...]:
        own = self.storage.tiers(shape, _rest(fitted))
        if not self.demote:
            return own
        return (Tier(self.chooser.codecs(shape, {})), *(tier._replace(every=True) for tier in own))

    def without_constant(self, fitted: Fitted, constant: Tensor) -> Fitted | None:
        return None if self.demote else self.storage.without_constant(fitted, constant)

    @property
    def rounds_window(self) -> bool:
        return self.storage.rounds_window

    def bits_per_token(self, shape: LayerShape, fitted: Fitted) -> float:
        self._check_classes(shape, self.lanes(shape))
        return self.storage.bits_per_token(shape, _rest(fitted))

    def body_bytes(self, shape: LayerShape, fitted: Fitted, pages: int) -> int:
        lanes = self.lanes(shape)
        kept = self.chooser.pages_kept(lanes, pages, under(fitted, PREFIX))
        if self.demote:
            exact = sum(codec.page_bytes() for codec in self.chooser.codecs(shape, {})) // lanes
            return self.storage.body_bytes(shape, _rest(fitted), pages) + kept * record_bytes(exact)
        page = int(self.bits_per_token(shape, fitted) * self.page / 8) // lanes
        return kept * record_bytes(page)

    def index_bytes(self, shape: LayerShape, pages: int, fitted: Fitted) -> int:
        lanes = self.lanes(shape)
        beside = self.storage.index_bytes(shape, pages, _rest(fitted)) if self.demote else 0
        own = self.chooser.pages_kept(lanes, pages, under(fitted, PREFIX))
        return beside + chosen_index(own, lanes, self.page, pages)

    def layer_bytes(self, shape: LayerShape, fitted: Fitted, tokens: int, batch: int = 1) -> int:
        held = super().layer_bytes(shape, fitted, tokens, batch)
        return held + batch * score_bytes(self, self.chooser.scorer({}), shape.heads, tokens)

    # --- what both learn ---

    @property
    def samples(self) -> bool:
        return self.storage.samples or self.chooser.samples

    @property
    def probes(self) -> bool:
        return self.storage.probes or self.chooser.probes

    def fit_layer(self, stats: CalibrationStats) -> dict[str, Tensor]:
        return self.storage.fit_layer(stats) | _prefixed(self.chooser.fit_layer(stats))

    def splits(self) -> Mapping[float, Method]:
        return self.storage.splits()

    def training(self) -> Training | None:
        return self.storage.training()

    def finish(
        self, layers: Mapping[int, Fitted], shapes: Mapping[int, LayerShape], probe: Probe | None
    ) -> tuple[dict[int, dict[str, Tensor]], dict[str, Any]]:
        found, record = self.storage.finish({i: _rest(x) for i, x in layers.items()}, shapes, probe)
        chosen, more = self.chooser.finish({i: under(x, PREFIX) for i, x in layers.items()}, shapes, probe)
        return {i: found[i] | _prefixed(chosen.get(i, {})) for i in found}, more | record


def compose(tokens: Method, store: Method) -> Compose:
    """Tokens as the first method chooses them, stored as the second one does. Window and sinks are the second one's.

    Raises SettingError where the first does not choose tokens, or the second one does."""
    schedule = getattr(tokens, "schedule", "prompt")
    return Compose(
        store.window,
        store.sinks,
        text_of(tokens, OURS),
        text_of(store, OURS),
        window_bits=store.window_bits,
        schedule=schedule if isinstance(schedule, int) else "prompt",
    )


def parse(parts: Sequence[str]) -> Compose:
    """From the parts of "snapkv:ratio=0.25 + cskv:keep=0.2,bits=4"; a third one, a quantiser, stores the second one's
    latents: "snapkv + cskv:keep=0.2 + turboquant:bits=2". Raises SettingError on parts that do not fit."""
    right = len(parts) in (2, 3) and all(parts)
    require(right, f"{' + '.join(parts)!r}", "Write tokens + store, or tokens + store + codec.")
    ours: dict[str, Any] = {}
    texts = []
    for part in parts:
        name, _, rest = part.strip().partition(":")
        own = parse_settings(rest)
        for key in [k for k in own if k in OURS]:
            value = own.pop(key)
            require(ours.get(key, value) == value, f"{key}={value} beside {key}={ours.get(key)}", "Give it once.")
            ours[key] = value
        texts.append((name.strip(), own))
    if len(texts) == 3:
        codec, bits = texts.pop()
        require(set(bits) <= {"bits"}, f"{parts[2]!r} as a codec", "It takes bits=... alone.")
        texts[1] = (texts[1][0], texts[1][1] | {"codec": codec} | bits)
    tokens, store = (text_of(methods.build(*text), OURS) for text in texts)
    found = methods.build("compose", {"tokens": tokens, "store": store, **ours})
    assert isinstance(found, Compose)
    return found


@lru_cache
def _built(text: str) -> Method:
    name, _, rest = text.partition(":")
    return methods.build(name.strip(), parse_settings(rest))


def _rest(fitted: Fitted) -> dict[str, Tensor]:
    return {k: fitted[k] for k in fitted if not k.startswith(PREFIX)}


def _prefixed(fitted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{PREFIX}{k}": t for k, t in fitted.items()}


def _groups(codec: Codec) -> int:
    """Groups of heads that a codec stores each by itself."""
    found = getattr(codec, "packing", None)
    return 1 if codec.joint or codec.constant is not None or found is None else int(found.groups)


METHOD = Compose

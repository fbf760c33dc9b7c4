"""What `attach` tries before it says yes: a layer's keys can be taken before RoPE, and our attention is its attention.

A family that looks like a known one but is not (differential attention, a mask of its own) gets refused, not
approximated. Costs some small forward passes of one attention module for each kind of layer.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvshrink.attach.asking import ask, cache_name
from kvshrink.attach.families import LayerInfo, compute_dtype, first_weight, shape_of, text_config
from kvshrink.attach.implementation import NAME, Ours, choose, previous
from kvshrink.attach.look import keywords, kind_of
from kvshrink.attach.twin import Twin
from kvshrink.cache.cache import KVCache
from kvshrink.cache.latents import maker_of
from kvshrink.cache.layer import CompressedLayer
from kvshrink.errors import KVShrinkError, UnsupportedModelError
from kvshrink.methods.quant.rtn import RTN
from kvshrink.store.tokens import TokenTable

TOKENS = 41  # enough for a page to leave a window of one token
EXACT = ("sdpa", "eager")  # implementations that run in float32


@torch.no_grad()
def check_layers(model: Any, layers: list[LayerInfo]) -> None:
    """Try one layer of each kind, in float32. Raises UnsupportedModelError."""
    # a layer that reads another's keys cannot run by itself; its attention is that of its kind
    alone = [info for info in layers if info.module is not None and info.kind != "dummy"]
    for info in {kind_of(info): info for info in reversed(alone)}.values():
        _Check(model, Twin(info)).run()


class _Check:
    """Trials of one attention module."""

    def __init__(self, model: Any, twin: Twin) -> None:
        self.model, self.twin, self.info = model, twin, twin.info
        self.module, self.type = twin.module, text_config(model).model_type
        self.before = previous(twin.module)
        generator, width = torch.Generator().manual_seed(0), text_config(model).hidden_size
        noise = torch.randn(1, TOKENS, width, generator=generator, dtype=torch.float32, device="cpu")
        self.hidden = noise.to(first_weight(self.module).device, twin.dtype or compute_dtype(self.module))

    def run(self) -> None:
        positions = torch.arange(TOKENS, device=self.hidden.device)[None]
        wanted = self._run(self.before if self.before in EXACT else "eager", self.hidden, positions, None)
        ours = self._run(NAME, self.hidden, positions, None)
        self._compare(ours, wanted, "attention output", "It does something else under another name of its attention.")
        if self.info.compressed:
            self._keys()
            self._attention(positions, wanted)

    def _keys(self) -> None:
        """Keys before RoPE, turned by us, beside what the module gives."""
        if self.info.moves:
            return
        hidden, positions = self.hidden[:, :3], torch.tensor([[0, 5, 11]], device=self.hidden.device)
        given = keywords(self.model, self.module, self.info.kind, hidden, positions)
        plain, turned = (ask(self.module, given, turned=t, queries=False).key for t in (False, True))
        rope = self.info.rope
        ours = plain if rope is None else rope.apply(plain.float(), positions)
        self._compare(ours, turned, "keys", "Its RoPE is of an unknown kind.")

    def _attention(self, positions: Tensor, wanted: Tensor) -> None:
        """One token over a lossless cache of ours, beside the module's own attention over all tokens at once."""
        method, table = RTN(bits=None, window=1, sinks=2), TokenTable()
        shape = replace(shape_of(replace(self.info, module=self.module)), dtype=self.hidden.dtype)
        layers: list = [CompressedLayer(method, shape, method.tiers(shape, {}), table)]
        # a module reaches its cache layer by its own index
        index = self.module.layer_idx
        cache = KVCache(layers * (index + 1), method, table, "check", "check")
        for part in (slice(0, TOKENS - 1), slice(TOKENS - 1, TOKENS)):
            maker, rope = maker_of(self.module) if self.info.latent else None, self.info.rope
            own = not self.info.latent or maker is not None
            cache.stage(index, positions[:, part].int(), None, rope, own, "check", maker=maker)
            ours = self._run(NAME, self.hidden[:, part], positions[:, part], cache)[:, -1]
        reason = "It does something in attention that a cache cannot know of."
        self._compare(ours, wanted[:, -1], "attention output", reason)

    def _run(self, implementation: str, hidden: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """The module on its own. Raises UnsupportedModelError if it needs more than what we give it."""
        given = keywords(self.model, self.module, self.info.kind, hidden, positions)
        if implementation == "eager":  # which takes no mask for all tokens
            lowest = torch.finfo(hidden.dtype).min
            given["attention_mask"] = hidden.new_full((hidden.shape[1],) * 2, lowest).triu(1)[None, None]
        given[cache_name(self.module.__class__)] = cache
        choose(self.module.config, Ours(self.before) if implementation == NAME else implementation)
        try:
            return self.module(**given)[0]
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else ""
            what = reason if isinstance(error, KVShrinkError) else f"{type(error).__name__}: {reason}"
            raise UnsupportedModelError(
                f"{self.type}: the attention of layer {self.module.layer_idx} cannot run on its own ({what}). "
                "It is of an unknown kind."
            ) from error

    def _compare(self, ours: Tensor, theirs: Tensor, what: str, reason: str) -> None:
        ours, theirs = ours.float(), theirs.float()
        error = float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-6))
        if not error <= self.twin.tolerance:
            raise UnsupportedModelError(
                f"{self.type}: {what} of layer {self.module.layer_idx} could not be recomputed "
                f"(relative error {error:.2g}). {reason}"
            )

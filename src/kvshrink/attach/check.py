"""What `attach` tries before it says yes: a layer's keys can be recomputed, and our attention is its attention.

A family that looks like a known one but is not (sink logits, differential attention, a cache shared by layers) gets
refused, not approximated. Costs some small forward passes of one attention module for each kind of layer.
"""

import threading
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvshrink.attach.families import (
    LayerInfo,
    compute_dtype,
    key_value,
    key_value_weights,
    position_embeddings,
    shape_of,
    text_config,
    text_tower,
)
from kvshrink.attach.implementation import NAME, Ours, choose, previous
from kvshrink.attach.twin import Twin, kind_of
from kvshrink.cache.cache import KVCache
from kvshrink.cache.layer import CompressedLayer
from kvshrink.errors import KVShrinkError, UnsupportedModelError
from kvshrink.methods.quant.rtn import RTN
from kvshrink.store.tokens import TokenTable

TOKENS = 41  # enough for a page to leave a window of one token
EXACT = ("sdpa", "eager")  # implementations that run in float32


class _Probe:
    """A stand-in for a cache that notes the key a module gives to it."""

    key: Tensor | None = None

    def update(self, key: Tensor, value: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        self.key = key
        return key, value


class _Reached(Exception):
    """Ends a forward pass at the first attention module."""

    def __init__(self, keywords: dict) -> None:
        self.keywords = keywords


@torch.no_grad()
def check_layers(model: Any, layers: list[LayerInfo], kinds: list[str]) -> None:
    """Try one layer of each kind, in float32. Raises UnsupportedModelError."""
    tried = {kind_of(info, kind): (info, kind) for info, kind in reversed(list(zip(layers, kinds, strict=True)))}
    for info, kind in tried.values():
        _Check(model, Twin(info), kind).run()
    _check_positions(model, layers[0].module)


class _Check:
    """Trials of one attention module."""

    def __init__(self, model: Any, twin: Twin, kind: str) -> None:
        self.model, self.twin, self.kind = model, twin, kind
        self.module, self.type = twin.module, text_config(model).model_type
        self.before = previous(twin.module)
        generator, width = torch.Generator().manual_seed(0), text_config(model).hidden_size
        noise = torch.randn(1, TOKENS, width, generator=generator, dtype=torch.float32, device="cpu")
        weight = key_value_weights(self.module)[0]
        self.hidden = noise.to(weight.device, twin.dtype or compute_dtype(self.module))

    def run(self) -> None:
        positions = torch.arange(TOKENS, device=self.hidden.device)[None]
        wanted = self._run(self.before if self.before in EXACT else "eager", self.hidden, positions, None)
        ours = self._run(NAME, self.hidden, positions, None)
        self._compare(ours, wanted, "attention output", "It does something else under another name of its attention.")
        if self.twin.info.compressed:
            self._keys()
            self._attention(positions, wanted)

    def _keys(self) -> None:
        """Recompute keys and compare with what the module gives."""
        probe, hidden = _Probe(), self.hidden[:, :3]
        positions = torch.tensor([[0, 5, 11]], device=hidden.device)
        self._run(NAME, hidden, positions, probe)
        keys, rope = key_value(self.module, hidden)[0].float(), self.twin.info.rope
        ours = keys if rope is None else rope.apply(keys, positions)
        if probe.key is None or probe.key.shape != ours.shape:
            raise UnsupportedModelError(
                f"{self.type}: layer {self.module.layer_idx} does not give its keys to a cache as expected."
            )
        self._compare(ours, probe.key, "keys", "Its projections, norms or RoPE are of an unknown kind.")

    def _attention(self, positions: Tensor, wanted: Tensor) -> None:
        """One token over a lossless cache of ours, beside the module's own attention over all tokens at once."""
        method, table = RTN(bits=None, window=1, sinks=2), TokenTable()
        shape = replace(shape_of(self.module), dtype=self.hidden.dtype)
        layers: list = [CompressedLayer(method, shape, method.tiers(shape, {}), table)]
        # a module reaches its cache layer by its own index
        cache = KVCache(layers * (self.module.layer_idx + 1), method, table, "check", "check")
        for part in (slice(0, TOKENS - 1), slice(TOKENS - 1, TOKENS)):
            cache.stage(self.module.layer_idx, positions[:, part].int(), None, self.twin.info.rope, True, "check")
            ours = self._run(NAME, self.hidden[:, part], positions[:, part], cache)[:, -1]
        reason = "It does something in attention that a cache cannot know of."
        self._compare(ours, wanted[:, -1], "attention output", reason)

    def _run(self, implementation: str, hidden: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """The module on its own. Raises UnsupportedModelError if it needs more than what we give it."""
        embeddings = position_embeddings(self.model, positions, hidden, self.kind)
        mask = None
        if implementation == "eager":  # which takes no mask for all tokens
            lowest = torch.finfo(hidden.dtype).min
            mask = hidden.new_full((hidden.shape[1], hidden.shape[1]), lowest).triu(1)[None, None]
        choose(self.module.config, Ours(self.before) if implementation == NAME else implementation)
        try:
            return self.module(
                hidden_states=hidden,
                position_embeddings=embeddings,
                attention_mask=mask,
                past_key_values=cache,
                position_ids=positions,
            )[0]
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


def _check_positions(model: Any, module: Any) -> None:
    """Run one token up to the first attention module. Raises UnsupportedModelError if that gets no positions."""
    given = _positions_of(model, module, None)
    if given is None:  # models of several axes may hand on one of their own for text
        given = _positions_of(model, module, torch.zeros(4, 1, 1, dtype=torch.long, device="cpu"))
    if given is None or given.dim() != 2:
        what = "no position_ids" if given is None else f"position_ids of {given.dim()} axes"
        raise UnsupportedModelError(
            f"{text_config(model).model_type}: its attention gets {what}. A cache needs (b, s)."
        )


def _positions_of(model: Any, module: Any, given: Tensor | None) -> Tensor | None:
    """What the module gets as position_ids; (1, 1) if the model cannot be run like this: the hook will look again."""
    me, weight = threading.get_ident(), key_value_weights(module)[0]

    def stop(module: Any, args: tuple, kwargs: dict) -> None:
        if threading.get_ident() == me:  # others may be running the model
            raise _Reached(kwargs)

    token = torch.zeros(1, 1, text_config(model).hidden_size, device=weight.device, dtype=compute_dtype(module))
    given = None if given is None else given.to(weight.device)
    handle = module.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        text_tower(model).forward(inputs_embeds=token, position_ids=given, use_cache=False)
    except _Reached as reached:
        found: Tensor | None = reached.keywords.get("position_ids")
        return found
    except Exception:
        return token[0, :, :1]
    finally:
        handle.remove()
    return None

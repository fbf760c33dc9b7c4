"""What `attach` tries before it says yes: a layer's keys can be recomputed, and our attention is its attention.

A family that looks like a known one but is not (sink logits, differential attention, a cache shared by layers) gets
refused, not approximated. Costs one small forward pass of one attention module each.
"""

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
)
from kvshrink.cache.cache import KVCache
from kvshrink.cache.layer import CompressedLayer
from kvshrink.errors import UnsupportedModelError
from kvshrink.methods.quant.rtn import RTN
from kvshrink.store.tokens import TokenTable

TOKENS = 41  # enough for a page to leave a window of one token


class _Probe:
    """A stand-in for a cache that notes the key a module gives to it."""

    key: Tensor | None = None

    def update(self, key: Tensor, value: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        self.key = key
        return key, value


@torch.no_grad()
def check_keys(model: Any, info: LayerInfo, kind: str) -> None:
    """Recompute a layer's keys and compare with what the module gives. Raises UnsupportedModelError if they differ."""
    module, probe = info.module, _Probe()
    hidden = _hidden(model, info)[:, :3]
    positions = torch.tensor([[0, 5, 11]], device=hidden.device)
    _run(model, info, kind, hidden, positions, probe)
    keys = key_value(module, hidden)[0].float()
    ours = keys if info.rope is None else info.rope.turn(keys, positions)
    if probe.key is None or probe.key.shape != ours.shape:
        raise UnsupportedModelError(
            f"{text_config(model).model_type}: layer {module.layer_idx} does not give its keys to a cache as expected."
        )
    _compare(model, info, ours, probe.key.float(), "keys", "Its projections, norms or RoPE are of an unknown kind.")


@torch.no_grad()
def check_attention(model: Any, info: LayerInfo, kind: str, name: str) -> None:
    """One token over a lossless cache of ours, beside the module's own attention over all tokens at once.

    Raises UnsupportedModelError if they differ: the module does something in attention that ours does not.
    """
    module = info.module
    hidden = _hidden(model, info)
    positions = torch.arange(TOKENS, device=hidden.device)[None]
    wanted = _run(model, info, kind, hidden, positions, None)[:, -1]
    method, table = RTN(bits=None, window=1, sinks=2), TokenTable()
    shape = shape_of(module)
    layers: list = [CompressedLayer(method, shape, method.tiers(shape, {}), table)]
    # a module reaches its cache layer by its own index
    cache = KVCache(layers * (module.layer_idx + 1), method, table, name, "check")
    for part in (slice(0, TOKENS - 1), slice(TOKENS - 1, TOKENS)):
        cache.stage(module.layer_idx, positions[:, part].int(), None, info.rope, True, name)
        ours = _run(model, info, kind, hidden[:, part], positions[:, part], cache)[:, -1]
    reason = "It does something in attention that a cache cannot know of."
    _compare(model, info, ours.float(), wanted.float(), "attention output", reason)


def _hidden(model: Any, info: LayerInfo) -> Tensor:
    config, generator = text_config(model), torch.Generator().manual_seed(0)
    noise = torch.randn(1, TOKENS, config.hidden_size, generator=generator)
    return noise.to(key_value_weights(info.module)[0].device, compute_dtype(info.module))


def _run(model: Any, info: LayerInfo, kind: str, hidden: Tensor, positions: Tensor, cache: Any) -> Tensor:
    """The attention module on its own. Raises UnsupportedModelError if it needs more than what we give it."""
    module, embeddings = info.module, position_embeddings(model, positions, hidden, kind)
    training = module.training
    module.eval()  # dropout would make two runs differ
    try:
        with torch.autocast(hidden.device.type, enabled=False):
            return module(
                hidden_states=hidden,
                position_embeddings=embeddings,
                attention_mask=None,
                past_key_values=cache,
                position_ids=positions,
            )[0]
    except (TypeError, AttributeError, RuntimeError, IndexError, KeyError, ValueError) as error:
        raise UnsupportedModelError(
            f"{text_config(model).model_type}: the attention of layer {info.module.layer_idx} cannot run on its own "
            f"({type(error).__name__}: {str(error).splitlines()[0]}). It is of an unknown kind."
        ) from error
    finally:
        module.train(training)


def _compare(model: Any, info: LayerInfo, ours: Tensor, theirs: Tensor, what: str, reason: str) -> None:
    error = float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-6))
    full = compute_dtype(info.module) == torch.float32
    if not error <= (1e-4 if full else 4e-2):
        raise UnsupportedModelError(
            f"{text_config(model).model_type}: {what} of layer {info.module.layer_idx} could not be recomputed "
            f"(relative error {error:.2g}). {reason}"
        )

"""A model under an attention function of ours for a while: what a fit looks at, or trains, inside attention."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from kvshrink.attach.families import LayerInfo, text_config
from kvshrink.attach.implementation import choose, distinct
from kvshrink.errors import UnsupportedModelError
from kvshrink.shapes import Bool, Float

NAME = "kvshrink_fits"
Attend = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]  # layer, queries, keys, values, scale -> [b, q, s, e]


@contextmanager
def attending(model: Any, infos: Mapping[int, LayerInfo], function: Attend) -> Iterator[None]:
    """Causal attention of these layers is `function`'s; others attend in full. Rows have no pads."""
    places = {id(info.module): i for i, info in infos.items()}

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **given: Any) -> Any:
        if given.get("softcap") is not None or given.get("s_aux") is not None:
            raise UnsupportedModelError(
                "scores of this model have a soft cap or sinks, which this fit does not know. Use kvzip, or snapkv."
            )
        scale = given.get("scaling") or query.shape[-1] ** -0.5
        if id(module) in places:
            out = function(places[id(module)], query, key, value, scale)
        else:
            out = torch.nn.functional.scaled_dot_product_attention(
                query, key, value, mask, is_causal=mask is None and query.shape[2] > 1, scale=scale, enable_gqa=True
            )
        return out.transpose(1, 2).contiguous(), None

    own = f"{NAME}_{threading.get_ident()}"  # fits of two threads are two functions
    AttentionInterface.register(own, attention)
    AttentionMaskInterface.register(own, sdpa_mask)
    configs = distinct([model.config, text_config(model), *(info.module.config for info in infos.values())])
    before = [(config, config._attn_implementation) for config in configs]
    try:
        for config in configs:
            choose(config, own)
        yield
    finally:
        for config, name in before:
            choose(config, name)


def near(tokens: int, sinks: int, recent: int, device: torch.device) -> Bool[Tensor, "s s"]:
    """What a head sees that streams: the first tokens and the recent ones, itself among them."""
    at = torch.arange(tokens, device=device)
    back = at[:, None] - at
    return (back >= 0) & ((back < recent) | (at < sinks))


def by_head(gates: Float[Tensor, " h"], query: Float[Tensor, "b q s d"]) -> Float[Tensor, "1 q 1 1"]:
    """Of each query head."""
    return gates.repeat_interleave(query.shape[1] // len(gates))[None, :, None, None]

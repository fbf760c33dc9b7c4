"""The attention function and the mask function that transformers calls by the name "kvshrink".

A call whose key carries a snapshot reads our cache; any other goes to the implementation that the model had before.
Both functions are registered together: without the mask function transformers passes no mask and left padding is
silently ignored.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvshrink.attach.grouped import grouped
from kvshrink.attach.implementation import NAME, previous
from kvshrink.attach.keywords import check_keywords, plain
from kvshrink.attach.listening import tell
from kvshrink.cache.attend import attend
from kvshrink.cache.latents import Pending, attend_latents, taken
from kvshrink.cache.snapshot import Snapshot
from kvshrink.cache.step import SNAPSHOT
from kvshrink.store.modes import at_once, autocast_on, own_modes


def kvshrink_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """Attention output [b, s, q, d]. See transformers' AttentionInterface for the contract."""
    snapshot = getattr(key, SNAPSHOT, None)
    if snapshot is None:
        pending = taken(module)
        if pending is not None:
            return _over_latents(pending, module, query, attention_mask, scaling, softcap, kwargs), None
        tell(query, key, scaling, softcap, kwargs.get("s_aux"))
        return _dense(module, query, key, value, attention_mask, scaling, dropout, softcap, kwargs)
    return _over(snapshot, module, query, key, value, attention_mask, scaling, softcap, kwargs), None


@at_once
@own_modes
def _over(
    snapshot: Snapshot,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
    kwargs: dict,
) -> Tensor:
    """Attention over our cache."""
    check_keywords(kwargs, type(module).__name__)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    sinks = kwargs.get("s_aux")
    return attend(query, key, value, mask, scale, softcap, snapshot, sinks).transpose(1, 2).contiguous()


@at_once
@own_modes
def _over_latents(
    pending: Pending,
    module: nn.Module,
    query: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
    kwargs: dict,
) -> Tensor:
    """Attention over our cache of latents."""
    check_keywords(kwargs, type(module).__name__, by_module=False)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend_latents(query, pending, mask, scale, softcap).transpose(1, 2).contiguous()


def register() -> None:
    """Make the name known to transformers. Called by `attach`, not at import."""
    AttentionInterface.register(NAME, kvshrink_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def _dense(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
    kwargs: dict,
) -> tuple[Tensor, Tensor | None]:
    """The model's own attention, with our boolean mask in the form that it expects."""
    name = previous(module)
    if name == "sdpa" and query.shape[2] == 1 and _plain(mask, dropout, softcap, kwargs):
        out = grouped(query, key, value, mask, scaling)
        if out is not None:
            return out.transpose(1, 2).contiguous(), None
    if query.device.type == "cpu" and query.shape[2] > 1:
        # as DynamicCache gives them: read many times, a head's tokens are faster side by side than among all heads'
        key, value = key.contiguous(), value.contiguous()
    extra = dict(kwargs) if softcap is None else {**kwargs, "softcap": softcap}
    if name == "eager":
        call: Callable = _eager_of(module)
        mask = _additive(mask, query, key)
    else:
        call = ALL_ATTENTION_FUNCTIONS[name]
    return call(module, query, key, value, mask, scaling=scaling, dropout=dropout, **extra)


def _plain(mask: Tensor | None, dropout: float, softcap: float | None, kwargs: dict) -> bool:
    """Whether nothing was asked of sdpa but attention over these keys, so that `grouped` may do it."""
    if torch.compiler.is_compiling() or autocast_on() or dropout != 0.0 or softcap is not None:
        return False
    return (mask is None or mask.dtype == torch.bool) and plain(kwargs)


def _eager_of(module: nn.Module) -> Callable:
    import sys

    return sys.modules[type(module).__module__].eager_attention_forward


def _additive(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """0 where visible, the lowest number elsewhere. No mask means causal, aligned at the last token."""
    s, t = query.shape[2], key.shape[2]
    if mask is None:
        if s == 1:
            return None
        mask = torch.ones(s, t, dtype=torch.bool, device=query.device).tril(t - s)[None, None]
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill(
        ~mask, torch.finfo(query.dtype).min
    )

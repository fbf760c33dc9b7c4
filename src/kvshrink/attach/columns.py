"""What a step's mask and positions say of its columns, and what of it a cache must refuse before anything has run.

A column is a token if any new query sees it, its own token's included, in any head; else it is a pad, such as padding
makes. Tokens are kept whatever later masks hide. Pads are not kept, so a mask that shows one later cannot be honoured.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer

from kvshrink.attach.implementation import previous
from kvshrink.cache.cache import KVCache
from kvshrink.errors import CacheError
from kvshrink.shapes import Bool, Int

MOST = torch.iinfo(torch.int32).max  # positions are stored in 32 bits
HIDDEN = -1e4  # added to a score it leaves no weight; masks are written with it, with -1e9 and with a dtype's lowest


def shown(mask: Tensor) -> Bool[Tensor, "..."]:
    """Which entries of a mask let a token be seen: of a 2-D one all but 0, as transformers reads it."""
    if mask.dtype == torch.bool or mask.dim() == 2:
        return mask.bool()
    return mask > HIDDEN  # an additive one


def new_tokens(mask: Tensor | None, b: int, s: int) -> Bool[Tensor, "b s"] | None:
    """Which of the s new columns are tokens; None if all are, as without a mask."""
    if mask is None:
        return None
    new = shown(mask[..., -s:])
    real = (new if mask.dim() == 2 else new.flatten(1, 2).any(1)).expand(b, s)
    return None if bool(real.all()) else real


def check_columns(cache: KVCache, decoder: Any, mask: Any, positions: Any, b: int, s: int, axes: bool = False) -> None:
    """Raise CacheError for a mask or positions that the cache cannot honour. `mask` may be one for each kind of layer.

    decoder: the attached one. b rows of s new tokens. axes: whether it takes positions of several axes.
    """
    seen, pads = cache.get_seq_length(), cache.table.pads
    # by kind of layer, it is that of full attention that speaks of all columns
    full = mask.get("full_attention") if isinstance(mask, dict) else mask
    if full is not None:
        _check_shape(full, b, s, seen, decoder.config.num_attention_heads)
        if full.dim() == 4:
            _check_entries(cache, decoder, full)
        if full.dim() == 4 and full is mask:
            _check_windows(cache, s, seen)
    if pads is not None:
        _refuse_shown(full, pads, s) if full is not None else _refuse_unmasked(pads, seen + s)
    if not (axes and isinstance(positions, Tensor) and positions.dim() == 3):  # time, height and width
        _check_positions(positions, new_tokens(full, b, s), b, s)


def _check_shape(mask: Any, b: int, s: int, seen: int, heads: int) -> None:
    if not isinstance(mask, Tensor):
        raise CacheError(f"attention_mask is a {type(mask).__name__}. Pass a tensor, ({b}, {seen + s}) for this step.")
    shape, t = tuple(mask.shape), seen + s
    if mask.dim() == 2:
        if shape != (b, t):
            raise CacheError(
                f"attention_mask has shape {shape}, but the cache holds {seen} tokens and the input {s}: "
                f"it must be ({b}, {t}), one column for every token so far."
            )
        return
    if mask.dim() != 4 or shape[0] not in (1, b) or shape[1] not in (1, heads) or shape[2:] != (s, t):
        raise CacheError(
            f"attention_mask has shape {shape}, but the cache holds {seen} tokens and the input {b} x {s}: it must be "
            f"({b}, {t}), or ({b}, 1 or {heads} query heads, {s}, {t}) to say it for each new token."
        )


def _check_entries(cache: KVCache, decoder: Any, mask: Tensor) -> None:
    before = previous(decoder)
    if mask.dtype == torch.bool:
        if before == "eager":
            raise CacheError(
                "eager attention adds a 4-D attention_mask to the scores, also one of bool. Pass floats, 0 where a "
                "token is seen, or load the model with 'sdpa'."
            )
        return
    if not mask.is_floating_point():
        raise CacheError(
            f"a 4-D attention_mask of {mask.dtype} can mean two things. Pass bool, True where a token is seen, "
            "or floats that are added to the scores."
        )
    own = cache.compressed[0].shape.dtype if cache.compressed else mask.dtype
    if mask.dtype not in (own, torch.float32):
        raise CacheError(f"attention_mask is of {mask.dtype} for a model of {own}. Pass that, float32 or bool.")
    if not bool(mask.amax() < torch.inf):  # which is infinite or NaN if any number is
        raise CacheError("attention_mask has NaN or +inf in it, and would make every output NaN. Pass finite ones.")


def _check_windows(cache: KVCache, s: int, seen: int) -> None:
    """A 4-D mask goes to every layer as it is, also to one that no longer holds all columns."""
    for layer in cache.layers:
        if isinstance(layer, DynamicSlidingWindowLayer) and (held := layer.get_mask_sizes(s)[0]) != seen + s:
            raise CacheError(
                f"a 4-D attention_mask covers {seen + s} columns, but layers with a sliding window hold {held}. Pass a "
                "2-D mask, or a dict with one for each kind of layer."
            )


def _refuse_shown(mask: Tensor, pads: Bool[Tensor, "b t"], s: int) -> None:
    """Pads are not kept: a mask that shows one now would read what is not there."""
    old = shown(mask[..., :-s])
    old = (old if mask.dim() == 2 else old.flatten(1, 2).any(1)).to(pads.device)
    if bool((wrong := old & pads).any()):
        row, column = wrong.nonzero()[0].tolist()
        raise CacheError(
            f"attention_mask shows column {column} of row {row}, which no token saw when it was stored, and such "
            "columns are not kept. Hide it, or make a new cache and pass its tokens again."
        )


def _refuse_unmasked(pads: Bool[Tensor, "b t"], t: int) -> None:
    row = int(pads.any(1).nonzero()[0])
    raise CacheError(
        f"attention_mask is missing, but {int(pads[row].sum())} columns of row {row} are pads, which would be seen "
        f"without it. Pass the mask of all columns, ({len(pads)}, {t})."
    )


def _check_positions(positions: Any, real: Bool[Tensor, "b s"] | None, b: int, s: int) -> None:
    if positions is None:  # the model counts by itself
        return
    whole = isinstance(positions, Tensor) and not (positions.is_floating_point() or positions.dtype == torch.bool)
    if not whole or positions.dim() != 2 or positions.shape[0] not in (1, b) or positions.shape[1] not in (1, s):
        what = (
            f"{positions.dtype} {tuple(positions.shape)}" if isinstance(positions, Tensor) else type(positions).__name__
        )
        raise CacheError(f"position_ids is {what}. Pass whole numbers, ({b}, {s}).")
    of_tokens = positions if real is None else positions.expand(b, s)[real]
    if not of_tokens.numel():
        return
    least, most = torch.stack(of_tokens.aminmax()).tolist()  # one wait for the device
    if least < 0 or most > MOST:
        raise CacheError(f"position_ids of tokens go from {least} to {most}. Only 0 to {MOST} can be stored.")


def positions_of(module: Any, positions: Any) -> Int[Tensor, "#b #s"]:
    """The position ids that an attention module got. Raises CacheError if they are not one for each token."""
    if not isinstance(positions, Tensor) or positions.dim() != 2:
        raise CacheError(f"{type(module).__name__} got no position_ids of its tokens. Call the model, not the layer.")
    return positions.to(torch.int32)

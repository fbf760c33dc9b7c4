"""What of a prompt a model needs, by its own account: it reads the prompt again behind itself, a chunk at a time, and
the most attention that a token gets meanwhile, from any query, is its importance (KVzip, arXiv 2505.23416).

Softmax is over the first tokens, the chunk and its repetition, as in the paper; the forward sees everything. A row of a
batch is judged by itself, without its pads. Departure: the paper's request ("Repeat the previous context:") is not put
before the chunk, since a hook knows no tokenizer; the last tokens of the chunk before are, as in the paper.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from kvshrink.attach.families import text_tower
from kvshrink.attach.listening import LISTENER
from kvshrink.attach.look import layers_of
from kvshrink.cache import KVCache
from kvshrink.cache.layer import CompressedLayer
from kvshrink.cache.leaving import left
from kvshrink.cache.passed import has_states
from kvshrink.errors import CacheError
from kvshrink.methods._evidence import Heard, Judged
from kvshrink.shapes import Bool, Float, Int
from kvshrink.store.modes import evaluating, without_dropout

QUERIES = 1024  # that are kept, of each KV head
CHUNK, BEFORE, FIRST = 2048, 8, 4  # tokens repeated at a time, of the chunk before, and of the text's beginning
SCORE_ELEMENTS = 2**22  # probabilities alive at a time


@dataclass(eq=False)
class Ear:
    """What is heard of one row's prompt of n tokens while one chunk of it, or all, is read again. count: queries that
    are kept, of each KV head."""

    n: int
    count: int
    scores: dict[int, Float[Tensor, "h n"]] = field(default_factory=dict)
    queries: dict[int, list[Float[Tensor, "h m d"]]] = field(default_factory=dict)
    positions: dict[int, list[Int[Tensor, " m"]]] = field(default_factory=dict)
    reach: dict[int, list[Int[Tensor, " m"]]] = field(default_factory=dict)
    sinks: dict[int, list[Float[Tensor, "h m"]]] = field(default_factory=dict)
    softcap: float | None = None


@without_dropout
@torch.no_grad()
def judged_by_reading_again(
    model: Any, dense: DynamicCache, ids: Int[Tensor, "b s"], mask: Tensor | None = None, queries: bool = False
) -> dict[int, Heard]:
    """What is heard of the last s tokens of a full cache, by layer. mask [b, s] is 0 at pads. queries: whether some
    of them are kept, of layers that all rows were heard in."""
    tower = text_tower(model)
    _check_states(dense)
    found: dict[int, Tensor] = {}
    ears = []
    for row in range(len(ids)):
        real = slice(None) if mask is None else mask[row, -ids.shape[1] :].bool()
        own = ids[row, real][None]
        ears.append(_of_row(tower, _row(dense, row, own.shape[1]), own, QUERIES if queries else 0))
        for i, scores in ears[-1].scores.items():
            if i not in found:
                found[i] = scores.new_zeros(len(ids), scores.shape[0], ids.shape[1])
            found[i][row, :, real] = scores
    return {i: _heard(i, scores, ears) for i, scores in found.items()}


def _heard(layer: int, scores: Float[Tensor, "b h s"], ears: Sequence[Ear]) -> Heard:
    if not all(layer in ear.queries for ear in ears):
        return Heard(scores)
    queries = torch.stack([torch.cat(ear.queries[layer], 1) for ear in ears])
    at = torch.stack([torch.cat(ear.positions[layer]) for ear in ears])
    reach = torch.stack([torch.cat(ear.reach[layer]) for ear in ears])
    sinks = [torch.cat(ear.sinks[layer], 1) for ear in ears if layer in ear.sinks]
    return Heard(scores, queries, at, reach, ears[0].softcap, torch.stack(sinks) if sinks else None)


def judged_prompt(cache: KVCache, tower: Any, given: Mapping[str, Any]) -> dict[int, Judged] | None:
    """Importance of a step's new tokens, where the cache's method wants the model to read them again; else None.

    A later prompt is judged by itself. Raises CacheError where its ids are not known.
    """
    some = next((layer for layer in cache.layers if isinstance(layer, CompressedLayer)), None)
    if some is None or some.policy.scorer is None or not some.policy.scorer.judged:
        return None
    ids, embedded = given.get("input_ids"), given.get("inputs_embeds")
    new = embedded if ids is None else ids
    few, room = some.method.page, some.method.window + some.method.page
    if new is None or new.shape[1] < few or cache.get_seq_length() + new.shape[1] < room:
        return None  # a few tokens stay, as those that are decoded, and those of a prompt from which nothing leaves
    if ids is None:
        raise CacheError(
            f"{type(tower).__name__} is given embeddings, by which it cannot read a prompt again. Use a method that "
            "ranks tokens by attention, such as snapkv, or pass input_ids."
        )
    mask = given.get("attention_mask")
    mask = mask[:, -ids.shape[1] :] if isinstance(mask, Tensor) and mask.dim() == 2 else None
    dense: Any = DynamicCache(config=tower.config)
    _check_states(dense)
    more = {} if mask is None else {"attention_mask": mask, "position_ids": (mask.long().cumsum(1) - 1).clamp_min(0)}
    with evaluating(tower), torch.no_grad():
        tower(input_ids=ids, past_key_values=dense, use_cache=True, **more)
    wanted = some.policy.scorer.listens
    return judged_of(cache, judged_by_reading_again(tower, dense, ids, mask, wanted), mask)


def _check_states(dense: DynamicCache) -> None:
    if any(has_states(layer) for layer in dense.layers):
        raise CacheError(
            "a layer of this model is a recurrence or a convolution, so that a prompt cannot be read again behind "
            "itself. Use a method that ranks tokens by attention, such as snapkv."
        )


def _row(dense: DynamicCache, row: int, tokens: int) -> list[Any]:
    """The layers of one row alone, of its last tokens. What is stored is shared."""
    layers = []
    for layer in dense.layers:
        own: Any = copy.copy(layer)
        if isinstance(getattr(own, "keys", None), Tensor):
            own.keys, own.values = (t[row : row + 1, :, -tokens:] for t in (own.keys, own.values))
        if hasattr(own, "cumulative_length"):
            own.cumulative_length = tokens
        layers.append(own)
    return layers


def _of_row(tower: Any, layers: list[Any], ids: Int[Tensor, "1 n"], count: int) -> Ear:
    n = ids.shape[1]
    ear, room = Ear(n, count), getattr(tower.config, "max_position_embeddings", None)
    if room is not None and 2 * n > room and not any(info.rope is not None for info in layers_of(tower)):
        raise CacheError(
            f"a prompt of {n} tokens is read again up to position {2 * n}, and {type(tower).__name__} has {room}. "
            "Use a method that ranks tokens by attention, such as snapkv."
        )
    for start in range(0, n, CHUNK):
        stop, before = min(start + CHUNK, n), max(0, start - BEFORE)
        again = ids[:, before:stop]
        cache: Any = Reread(layers, partial(_note, ear, start, stop, again.shape[1]))
        positions = torch.arange(n, n + again.shape[1], device=ids.device)[None]
        tower(input_ids=again, past_key_values=cache, position_ids=positions, use_cache=True)
    if not ear.scores:
        raise CacheError(
            "the model's attention is not ours to listen to. Use model.set_attn_implementation('kvshrink')."
        )
    return ear


class Reread(DynamicCache):
    """A full cache that gives its layers' keys with a listener, and keeps nothing that is read."""

    def __init__(self, layers: list[Any], listen: Callable[..., None]) -> None:
        super().__init__()
        self.layers, self.listen = [copy.copy(layer) for layer in layers], listen

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        layer: Any = self.layers[layer_idx]
        keys, values = layer.update(key_states, value_states, *args, **kwargs)
        keys = keys.view_as(keys)
        setattr(keys, LISTENER, partial(self.listen, layer_idx))
        return keys, values


def _note(
    ear: Ear,
    start: int,
    stop: int,
    again: int,
    layer: int,
    query: Float[Tensor, "1 q x d"],
    keys: Float[Tensor, "1 h t d"],
    scale: float,
    softcap: float | None,
    sinks: Float[Tensor, " q"] | None,
) -> None:
    """The most that each of the chunk's tokens gets, by KV head."""
    n = ear.n
    if keys.shape[2] != n + again:  # a sliding window has let some go
        return
    h = keys.shape[1]
    columns = torch.cat([torch.arange(min(FIRST, start)), torch.arange(start, stop), torch.arange(n, n + again)])
    own = keys[0][:, columns.to(keys.device)]  # [h, c, d]
    queries = query[0].unflatten(0, (h, -1)) * scale  # [h, m, x, d]
    by_member = None if sinks is None else sinks.float().view(h, -1)
    if ear.count:
        ear.softcap = softcap
        some, tokens, members = _some(queries, ear.count * stop // n - ear.count * start // n)
        if by_member is not None:
            ear.sinks.setdefault(layer, []).append(by_member[:, members])
        ear.queries.setdefault(layer, []).append(some)
        ear.positions.setdefault(layer, []).append(n + tokens)
        ear.reach.setdefault(layer, []).append(torch.full_like(tokens, n + again))
    before = min(FIRST, start)
    scores = ear.scores.setdefault(layer, keys.new_zeros(h, n, dtype=torch.float32))
    size = max(1, SCORE_ELEMENTS // (queries.shape[1] * len(columns)))
    order = torch.arange(again, device=keys.device)
    for head in range(h):
        for at in range(0, again, size):
            part = queries[head, :, at : at + size]
            weights = (part.flatten(0, 1).to(own.dtype) @ own[head].T).float().unflatten(0, part.shape[:2])
            if softcap is not None:
                weights = (weights / softcap).tanh_().mul_(softcap)
            later = order > order[at : at + size, None]
            weights[:, :, -again:].masked_fill_(later, -torch.inf)
            if by_member is not None:
                weights = torch.cat([weights, by_member[head, :, None, None].expand(-1, part.shape[1], 1)], 2)
            most = weights.softmax(-1)[:, :, before : before + stop - start].amax((0, 1))
            scores[head, start:stop] = torch.maximum(scores[head, start:stop], most)


def _some(
    queries: Float[Tensor, "h g x d"], count: int
) -> tuple[Float[Tensor, "h m d"], Int[Tensor, " m"], Int[Tensor, " m"]]:
    """So many of a KV head's queries: of tokens evenly spread, of one query head after the other; which they are."""
    order = torch.arange(count, device=queries.device)
    tokens, members = order * queries.shape[2] // max(1, count), order % queries.shape[1]
    return queries[:, members, tokens].clone(), tokens, members


def judged_of(cache: KVCache, raw: Mapping[int, Heard], mask: Tensor | None) -> dict[int, Judged]:
    """What layers are told of a prompt: the new tokens' scores, and by lane what a token that leaves must have to stay,
    of all layers together."""
    layers = {i: x for i, x in enumerate(cache.layers) if isinstance(x, CompressedLayer) and i in raw}
    some = next(iter(layers.values()), None)
    if some is None or some.policy.scorer is None or not some.policy.scorer.judged:
        return {}
    page, window, first = some.method.page, some.method.window, next(iter(raw.values())).scores
    b, _, s = first.shape
    held = cache.get_seq_length()
    shifts = np.zeros(b, np.int64) if cache.table.shifts is None else cache.table.shifts
    before, after = (left(n - shifts, window, page) for n in (np.full(b, held), np.full(b, held + s)))
    new = torch.ones(b, s, dtype=torch.bool) if mask is None else mask[:, -s:].bool().cpu()
    real = torch.cat([cache.table.positions.cpu() >= 0, new], 1) if held else new
    column = torch.arange(held + s)
    ends = torch.from_numpy(after + shifts)[:, None]
    there = real & (column < ends) & (real.cumsum(1) > some.method.sinks)
    candidates = {i: _candidates(x, raw[i].scores, held, there.to(raw[i].scores.device)) for i, x in layers.items()}
    decoded = max(int((x == torch.inf).any(1).sum(1).max()) for x in candidates.values())
    # what was decoded stays anyway, and has no share
    start = before // page if not decoded else np.zeros_like(before)
    stop = after // page if not decoded else np.maximum(0, (after - before - decoded) // page)
    given = {i: x.masked_fill(x == torch.inf, -torch.inf) for i, x in candidates.items()}
    least = some.policy.scorer.least(given, list(zip(start.tolist(), stop.tolist(), strict=True)), page)
    by_head = {i: least[i].repeat_interleave(raw[i].scores.shape[1] // least[i].shape[1], 1) for i in layers}
    return {i: Judged(raw[i], by_head[i]) for i in layers}


def _candidates(
    layer: CompressedLayer, raw: Float[Tensor, "b h s"], held: int, there: Bool[Tensor, "b c"]
) -> Float[Tensor, "b L t"]:
    """Scores of the tokens that leave now, the window's and the new ones; -inf elsewhere. Heads that share a lane share
    the choice, by the mean."""
    waiting = layer.window.scores
    scores = raw if waiting is None else torch.cat([waiting.to(raw.device), raw], 2)
    by_lane = scores.unflatten(1, (layer.body.lanes, -1)).mean(2)
    own = there[:, there.shape[1] - by_lane.shape[2] :]
    return by_lane.masked_fill(~own[:, None], -torch.inf)

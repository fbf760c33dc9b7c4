"""One exact prefill for all caches of a comparison.

Every method's prefill is the model's own exact attention, so it runs once; each cache is then given the same keys and
values through its own `update`, as the model would give them, and the queries of some tokens, for methods that rank
tokens by importance.
"""

import copy
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from kvshrink.attach.hook import Attachment
from kvshrink.attach.inputs import by_name
from kvshrink.attach.judging import judged_by_reading_again, judged_of
from kvshrink.attach.look import layers_of
from kvshrink.attach.stage import probe_queries_of
from kvshrink.cache import KVCache
from kvshrink.cache.layer import CompressedLayer
from kvshrink.cache.passed import has_states, restore_states, states_of
from kvshrink.cache.scoring import ProbeQueries
from kvshrink.methods._evidence import Heard
from kvshrink.methods._roles import Method
from kvshrink.methods._stats import SOME
from kvshrink.store.modes import without_dropout


class Wanted(NamedTuple):
    """What methods want of a prompt beside keys and values, to rank tokens as they do.

    asked: of so many tokens, those that must give their queries, in order; None: none. hidden: whether layers' inputs
    are wanted. judged: whether the model is to read the prompt again (attach/judging.py); queries: whether some of
    those it reads with are wanted then.
    """

    asked: Callable[[int], Tensor] | None = None
    hidden: bool = False
    judged: bool = False
    queries: bool = False

    @property
    def nothing(self) -> bool:
        return self == Wanted()


NOTHING = Wanted()


def held_by(layer: Any) -> tuple[Tensor, Tensor]:
    """Keys and values [b, h, t, d] of a layer of a full cache, whatever kind of layer it is."""
    return layer.keys, layer.values


@without_dropout
@torch.inference_mode()
def prefill(model: Any, ids: Tensor, mask: Tensor | None = None, wanted: Wanted = NOTHING) -> DynamicCache:
    """The full cache after these tokens [b, t]; mask [b, t] is 0 at left pads. wanted: as `wanted_by` says."""
    dense = DynamicCache(config=model.config)
    given: dict = {} if mask is None else {"attention_mask": mask, "position_ids": positions_of(mask)}
    asked: dict[int, ProbeQueries] = {}
    hidden: dict[int, Tensor] = {}
    hooks = []
    if wanted.asked is not None or wanted.hidden:
        hooks = [
            info.module.register_forward_pre_hook(partial(_listen, asked, hidden, i, wanted), with_kwargs=True)
            for i, info in enumerate(layers_of(model))
            if info.compressed
        ]
    try:
        model(input_ids=ids, past_key_values=dense, use_cache=True, logits_to_keep=1, **given)
    finally:
        for hook in hooks:
            hook.remove()
    made: Any = dense
    made.asked, made.hidden = asked, hidden
    for layer in made.layers:
        # a sliding-window layer holds a view of all tokens, of which a copy would keep every byte alive
        if isinstance(getattr(layer, "keys", None), Tensor):
            layer.keys, layer.values = _own(layer.keys), _own(layer.values)
    made.judged = judged_by_reading_again(model, dense, ids, mask, wanted.queries) if wanted.judged else None
    return dense


def wanted_by(methods: Iterable[Any]) -> Wanted:
    """What each of these methods or artifacts wants, together. None among them is no method."""
    own = [getattr(m, "method", m) for m in methods if m is not None]
    scorers = [s for m in own if isinstance(m, Method) and (s := m.policy(SOME, {}).scorer) is not None]
    asking = [s for s in scorers if s.asks]
    asked = (lambda count: torch.cat([s.queries(count) for s in asking]).unique()) if asking else None
    judged, heard = any(s.judged for s in scorers), any(s.listens for s in scorers)
    return Wanted(asked, any(s.hidden for s in scorers), judged, heard)


def _listen(
    asked: dict[int, ProbeQueries],
    hidden: dict[int, Tensor],
    index: int,
    wanted: Wanted,
    module: Any,
    args: tuple,
    kwargs: dict,
) -> None:
    """Pre-hook of an attention module: its input, and the queries of the tokens that are asked."""
    given = by_name(module, args, kwargs)
    states = given["hidden_states"]
    if wanted.hidden:
        hidden[index] = states
    if wanted.asked is not None:
        asked[index] = probe_queries_of(module, given, wanted.asked(states.shape[1]).to(states.device))


def _own(tensor: Any) -> Any:
    whole = tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole else tensor.clone()


@torch.inference_mode()
def fill(cache: KVCache, dense: Any, attachment: Attachment, mask: Tensor | None = None) -> None:
    """Give an empty cache the keys and values of a prefill, layer by layer. mask as for `prefill`."""
    raw = getattr(dense, "judged", None)
    if raw is None and any(
        layer.policy.scorer is not None and layer.policy.scorer.judged for layer in cache.compressed
    ):
        raw = _unjudged(cache, dense)
    cache.judged = None if raw is None else judged_of(cache, raw, mask)
    for i, info in enumerate(attachment.layers):
        if not info.compressed:
            before, own = getattr(cache.layers[i], "shape", None), copy.deepcopy(dense.layers[i])
            if before is not None:
                own.shape = before
            cache.layers[i] = own
            continue
        keys, values = dense.layers[i].keys, dense.layers[i].values
        if has_states(cache.layers[i]):
            restore_states(cache.layers[i], {k: t.clone() for k, t in states_of(dense.layers[i]).items()})
        b, _, t, _ = keys.shape
        if mask is None:
            positions = torch.arange(t, device=keys.device)[None].expand(b, -1)
        else:
            positions = positions_of(mask)
        real = None if mask is None or bool(mask.all()) else mask.bool()
        layer, asked = cache.layers[i], None
        if isinstance(layer, CompressedLayer) and (rows := layer.probes(t)) is not None:
            asked = _part(getattr(dense, "asked", {}).get(i), rows)
        hidden = getattr(dense, "hidden", {}).get(i)
        own = not info.latent
        cache.stage(i, positions.to(torch.int32), real, info.rope, own, cache.model, asked, hidden=hidden)
        cache.update(keys, values, i)
    cache.judged = None


def _unjudged(cache: KVCache, dense: Any) -> dict[int, Heard]:
    """Scores of nobody, where no model has read a prompt again: bytes do not depend on how tokens are ranked."""
    draw = torch.Generator().manual_seed(0)
    layers = {i: dense.layers[i].keys for i, x in enumerate(cache.layers) if isinstance(x, CompressedLayer)}
    return {i: Heard(torch.rand(keys.shape[:3], generator=draw).to(keys.device)) for i, keys in layers.items()}


def _part(given: ProbeQueries | None, rows: Tensor) -> ProbeQueries | None:
    """The queries of these rows; None unless all are there: bytes do not depend on how tokens are ranked."""
    if given is None or not bool(torch.isin(rows := rows.to(given.rows.device), given.rows).all()):
        return None
    return given._replace(rows=rows, queries=given.queries[:, :, torch.searchsorted(given.rows, rows)])


def positions_of(mask: Tensor) -> Tensor:
    """Positions as `generate` makes them: tokens are counted from 0, pads are at 0."""
    return (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)

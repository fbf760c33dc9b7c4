"""Pre-hooks: what one step hands to a cache that transformers does not pass, and input refused before it runs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvshrink.attach.asking import ask, cache_name, of_tokens
from kvshrink.attach.columns import check_columns, new_tokens, positions_of
from kvshrink.attach.families import LayerInfo
from kvshrink.attach.images import check_marks
from kvshrink.attach.implementation import is_ours
from kvshrink.attach.inputs import by_name, extra
from kvshrink.attach.judging import judged_prompt
from kvshrink.attach.keywords import check_keywords
from kvshrink.attach.once import forget, made_once
from kvshrink.attach.owner import check_owner
from kvshrink.cache.cache import KVCache
from kvshrink.cache.latents import hand_over, maker_of
from kvshrink.cache.layer import CompressedLayer
from kvshrink.cache.passed import has_states, lasting
from kvshrink.cache.scoring import ProbeQueries
from kvshrink.errors import CacheError
from kvshrink.shapes import Int
from kvshrink.store.modes import at_once, compiled, own_modes


class Stage:
    """Pre-hook of a shrunken layer's attention: stages positions and pads on the layer that `update` will reach."""

    def __init__(self, info: LayerInfo, model: str) -> None:
        self.index, self.rope, self.model = info.module.layer_idx, info.rope, model
        self.latent = info.latent
        self.name = cache_name(info.module.__class__)

    def __call__(self, module: Any, args: tuple, kwargs: dict) -> None:
        if self.latent:
            hand_over(None)  # what an interrupted step left
        cache = kwargs.get(self.name)
        if cache is None and args:
            cache = next((a for a in args if isinstance(a, KVCache)), None)
        if isinstance(cache, KVCache):
            try:
                self._stage(module, by_name(module, args, kwargs), cache, not compiled())
            except BaseException:
                forget(module)  # the step does not come
                raise

    @at_once
    @own_modes
    def _stage(self, module: Any, given: Mapping[str, Any], cache: KVCache, plain: bool) -> None:
        hidden = given["hidden_states"]
        b, s = hidden.shape[:2]
        layer, probe_queries = cache.layers[self.index], None
        assert isinstance(layer, CompressedLayer)
        positions = cache.turned_by if cache.turned_by is not None else given.get("position_ids")
        if positions is None and cache.stepping:  # a module that takes none: as the model counts them
            positions = torch.arange(layer.seen, layer.seen + s, device=hidden.device)[None]
        positions = positions_of(module, positions)
        maker = maker_of(module) if self.latent else None
        own = is_ours(module) and (not self.latent or maker is not None)
        if own and layer.shrunken:
            # refused here, where this layer does not hold the new tokens yet
            check_keywords(extra(module, given), type(module).__name__, by_module=False)
        # the token table is one for all layers; only the step's first compressed layer extends it
        real = new_tokens(given.get("attention_mask"), b, s) if cache.table.length == layer.seen else None
        rope = self.rope
        if rope is not None:
            rope = self.rope = rope.to(hidden.device)  # the model may have been moved after attach
            positions = rope.marked(positions)
        if (rows := layer.probes(s)) is not None:
            probe_queries = probe_queries_of(module, given, rows.to(hidden.device), plain)
        scorer = layer.policy.scorer
        hidden = hidden if scorer is not None and scorer.hidden else None
        cache.stage(self.index, positions, real, rope, own, self.model, probe_queries, maker if own else None, hidden)


@torch.no_grad()
def probe_queries_of(
    module: Any, given: Mapping[str, Any], rows: Int[Tensor, " x"], before: bool = False
) -> ProbeQueries:
    """Queries of some of the new tokens, as the module's attention uses them; the others are not projected.

    given: the keywords that the module is called with. before: whether it is called with them next. Raises CacheError
    if it hands its queries to nobody.
    """
    hidden = given["hidden_states"]
    if before and len(rows) == hidden.shape[1] > 1:
        whole = {k: None if k == "attention_mask" else v for k, v in given.items()}
        with made_once(module, hidden):
            asked = ask(module, whole, turned=True)
    else:
        asked = ask(module, of_tokens(given, rows), turned=True)
    if asked.query is None:
        raise CacheError(f"{type(module).__name__} shows no queries, by which this method ranks tokens.")
    return ProbeQueries(rows, asked.query * asked.scale, asked.softcap, asked.sinks)


@dataclass(frozen=True)
class CheckInput:
    """Pre-hook of the decoder of the attachment `name`: what would silently give wrong tokens is refused."""

    name: str
    axes: bool = False  # whether the decoder takes positions of several axes

    def __call__(self, module: Any, args: tuple, kwargs: dict) -> None:
        given = by_name(module, args, kwargs)
        cache = given.get("past_key_values")
        if isinstance(cache, KVCache):
            _check_input(self, cache, module, given)
            cache.judged = None
            cache.judged = judged_prompt(cache, module, given)  # a step of its own, which may be interrupted
            _begin(cache)


@at_once
@own_modes
def _check_input(hook: CheckInput, cache: KVCache, module: Any, arguments: Mapping[str, Any]) -> None:
    given = arguments.get("input_ids")
    given = arguments.get("inputs_embeds") if given is None else given
    if given is None:
        return
    cache.check_whole()
    b, s = given.shape[:2]
    seen = cache.get_seq_length()
    if b == 0 or s == 0:
        raise CacheError(
            f"the input is empty ({b} x {s} tokens) while the cache holds {seen}. Pass at least one new token."
        )
    if (rows := cache.rows or b) != b:
        raise CacheError(
            f"the cache holds {rows} sequences, the input has {b}. Call batch_repeat_interleave or make another cache."
        )
    check_owner(module, hook.name, cache, s)
    positions = arguments.get("position_ids")
    check_columns(cache, module, arguments.get("attention_mask"), positions, b, s, hook.axes)
    # keys are turned by all axes; of text they are one, and a row that counts may be before them
    cache.turned_by = positions[-3] if isinstance(positions, Tensor) and positions.dim() == 3 else None
    check_marks(cache, b, s)


@at_once
def _begin(cache: KVCache) -> None:
    """Nothing is refused any more: the step runs."""
    cache.stepping = True
    if states := [layer for layer in cache.layers if has_states(layer)]:
        for layer in states:
            lasting(layer)
        cache.whole = False  # a state does not say how many tokens it has seen


def end_step(module: Any, args: tuple, kwargs: dict, output: Any) -> None:
    """Hook behind the decoder: the step came to its end."""
    cache = by_name(module, args, kwargs).get("past_key_values")
    if isinstance(cache, KVCache):
        _ended(cache)


@at_once
def _ended(cache: KVCache) -> None:
    cache.whole, cache.turned_by, cache.stepping, cache.visual, cache.judged = True, None, False, None, None

"""What an attention module hands over, found by running it: its names for projections, norms and heads do not matter.

A call is stopped where the module reaches its cache, or its attention function. With every token at position 0, which
turns nothing, what arrives there is the key before RoPE.
"""

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from kvshrink.attach.implementation import choose
from kvshrink.errors import UnsupportedModelError
from kvshrink.shapes import Float, Int

NAME, MARK = "kvshrink_asks", "_kvshrink_asks"
CACHES = ("past_key_values", "layer_past", "past_key_value")  # what modules call their cache


@dataclass
class Asked:
    """What a module gave: keys and values [b, h, s, d] to its cache, queries [b, q, s, d] to its attention function.

    query: None of a module that has no attention function of transformers, or whose keys are made of what it caches.
    scaling, softcap, sinks: of scores; sinks are logits [q] of no key.
    """

    key: Tensor
    value: Tensor
    query: Tensor | None = None
    scaling: float | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def scale(self) -> float:
        assert self.query is not None
        return self.query.shape[-1] ** -0.5 if self.scaling is None else self.scaling


class Reached(Exception):
    """Ends a call of a module."""


@dataclass
class Catch:
    """Stands in for a cache. stop: whether nothing behind the cache is to run."""

    stop: bool
    found: Asked | None = None

    def get_seq_length(self, *args: Any) -> int:
        return 0

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"a cache of tokens has no {name}")

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.found = Asked(key, value)
        if self.stop:
            raise Reached
        marked = key.view_as(key)
        setattr(marked, MARK, self.found)
        return marked, value


def _attention(module: Any, query: Tensor, key: Tensor, *args: Any, **keywords: Any) -> None:
    """Stands in for an attention function: notes what it is called with, if keys are those that the cache gave."""
    found: Asked | None = getattr(key, MARK, None)
    if found is not None:
        found.query, found.scaling, found.softcap = query, keywords.get("scaling"), keywords.get("softcap")
        found.sinks = keywords.get("s_aux")
    raise Reached


def ask(module: Any, given: Mapping[str, Any], turned: bool = False, queries: bool = True) -> Asked:
    """What the module gives when it is called with these keywords, its own cache left out.

    turned: at the positions that are given, else all at position 0. queries: whether they are asked for as well.
    Raises UnsupportedModelError if it gives nothing to a cache.
    """
    shadow, catch = shadow_of(module) if queries else module, Catch(stop=not queries)
    keywords = {k: v for k, v in given.items() if k not in CACHES}
    if not turned:
        keywords |= {k: unturned(k, keywords[k]) for k in ("position_embeddings", "position_ids") if k in keywords}
    keywords[cache_name(module.__class__)] = catch
    try:
        type(module).forward(shadow, **keywords)
    except Reached:
        pass
    if catch.found is None:
        raise UnsupportedModelError(f"{type(module).__name__} gives nothing to its cache.")
    return catch.found


@cache
def names_of(kind: Any) -> frozenset[str]:
    """What a class of modules can be called with, its parents' keywords too where it hands on what it does not name."""
    found: set[str] = set()
    for parent in kind.__mro__:
        if "forward" in vars(parent):
            found |= set(inspect.signature(parent.forward).parameters)
            if not hands_on(parent):
                break
    return frozenset(found)


@cache
def hands_on(kind: Any) -> bool:
    """Whether a class of modules takes any keyword."""
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(kind.forward).parameters.values())


@cache
def cache_name(kind: Any) -> str:
    """What a class of modules calls its cache. Raises UnsupportedModelError if it takes none."""
    names = names_of(kind)
    for name in CACHES:
        if name in names:
            return name
    raise UnsupportedModelError(f"{kind.__name__} takes no cache.")


def shadow_of(module: Any) -> Any:
    """The module under another config, which names our stand-in: all it has inside is shared."""
    AttentionInterface.register(NAME, _attention)
    shadow = copy.copy(module)
    if hasattr(module, "config"):
        shadow.config = copy.copy(module.config)
        choose(shadow.config, NAME)
    return shadow


def unturned(name: str, given: Any) -> Any:
    """Positions that are all 0, or the cosines and sines of such."""
    if name == "position_ids":
        return None if given is None else torch.zeros_like(given)
    if isinstance(given, Tensor):  # cosines and sines as one complex number
        return torch.ones_like(given)
    if isinstance(given, tuple | list) and len(given) == 2:
        return torch.ones_like(given[0]), torch.zeros_like(given[1])
    return given


def of_tokens(given: Mapping[str, Any], rows: Int[Tensor, " x"]) -> dict[str, Any]:
    """The keywords of a call for some of its tokens alone, without a mask."""
    s = given["hidden_states"].shape[1]
    some = dict(given) | {"hidden_states": given["hidden_states"][:, rows], "attention_mask": None}

    def taken(part: Any, dim: int) -> Any:
        whole = isinstance(part, Tensor) and part.dim() >= -dim and part.shape[dim] == s
        return part.index_select(dim, rows) if whole else part

    turns = given.get("position_embeddings")
    if isinstance(turns, tuple | list):
        some["position_embeddings"] = tuple(taken(part, -2) for part in turns)
    elif turns is not None:
        some["position_embeddings"] = taken(turns, -2)
    if "position_ids" in given:
        some["position_ids"] = taken(given["position_ids"], -1)
    return {k: v for k, v in some.items() if k in given}


def key_value(module: Any, given: Mapping[str, Any]) -> tuple[Float[Tensor, "b h s d"], Float[Tensor, "b h s d"]]:
    """Keys before RoPE and values of a call with these keywords, as the module makes them."""
    found = ask(module, given, queries=False)
    return found.key, found.value

"""Attention over latents that keys and values of all heads are made of (MLA, DeepSeek-V2, arXiv 2405.04434).

A cache of such a layer holds, of each token, a latent c [r] and a key k [e] with RoPE that heads share. Head i's key is
[U_i c, k] and its value W_i c. The query is taken to the latents instead, [U_i^T q, q'], so that stored ones are read a
block at a time as they are, and W_i is applied once, to the weighted sum of latents: no head's key or value is made.

The module itself makes keys and values of what `update` returns, and hands those to attention. What is stored comes
beside them, through this thread.
"""

import threading
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from kvshrink.cache.attend import attend
from kvshrink.cache.snapshot import Block, Snapshot, TierView
from kvshrink.kernels.decode import Choice
from kvshrink.methods._roles import Codec, Stored
from kvshrink.shapes import Float
from kvshrink.store.names import under
from kvshrink.store.plain import is_plain


class Up(NamedTuple):
    """U and W of all heads."""

    keys: Float[Tensor, "q n r"]
    values: Float[Tensor, "q v r"]


class Maker(NamedTuple):
    """A module whose keys and values are made of what is cached, and by which matrices."""

    module: Any
    up: Up


class Pending(NamedTuple):
    """What a module's attention reads in this step: exact latents [b, 1, w, r] and keys [b, 1, w, e], and the rest."""

    maker: Maker
    latents: Tensor
    keys: Tensor
    snapshot: Snapshot


class _Step(threading.local):
    pending: Pending | None = None


STEP = _Step()


def hand_over(pending: Pending | None) -> None:
    """For the module that will call its attention next, on this thread."""
    STEP.pending = pending


def taken(module: Any) -> Pending | None:
    """What was left for this module, once."""
    pending, STEP.pending = STEP.pending, None
    return pending if pending is not None and pending.maker.module is module else None


def maker_of(module: Any) -> Maker | None:
    """An MLA module with its matrices; None where its projection does more than a product with floats (an adapter, a
    bias, a hook, codes), or where they learn."""
    names, linear = ("qk_nope_head_dim", "v_head_dim", "kv_lora_rank"), getattr(module, "kv_b_proj", None)
    if type(linear) is not nn.Linear or not all(isinstance(getattr(module, n, None), int) for n in names):
        return None
    weight, hooks = linear.weight, (linear._forward_hooks, linear._forward_pre_hooks)
    if linear.bias is not None or any(hooks) or (torch.is_grad_enabled() and weight.requires_grad):
        return None
    n, v, r = (getattr(module, name) for name in names)
    plain = is_plain(weight) and weight.is_floating_point() and weight.dtype.itemsize > 1
    if not plain or weight.shape[1] != r or weight.shape[0] % (n + v):
        return None
    keys, values = weight.detach().view(-1, n + v, r).split([n, v], 1)
    return Maker(module, Up(keys, values))


def attend_latents(
    query: Float[Tensor, "b q s c"],
    pending: Pending,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
) -> Float[Tensor, "b q s v"]:
    """Attention of s new tokens to everything that is cached. The query is [q, q'] of each head."""
    up = pending.maker.up
    own, shared = query.float().split([up.keys.shape[1], query.shape[3] - up.keys.shape[1]], 3)
    taken_over = torch.cat([torch.einsum("bqsn,qnr->bqsr", own, up.keys.float()), shared], 3)
    snapshot, sinks = pending.snapshot, pending.snapshot.sinks
    if sinks is not None:
        sinks = sinks._replace(keys=torch.cat([sinks.keys, sinks.values], 3), values=sinks.keys)
    tiers = tuple(_Tier((_Keys(tier.codecs), _Values(tier.codecs)), tier.pages, tier.base) for tier in snapshot.tiers)
    whole = replace(snapshot, sinks=sinks, tiers=tiers, held=None)  # exact ones came with it
    keys = torch.cat([pending.latents, pending.keys], 3)
    found = attend(taken_over, keys, pending.latents, mask, scaling, softcap, whole)
    return torch.einsum("bqsr,qvr->bqsv", found, up.values.float()).to(query.dtype)


@dataclass(frozen=True, eq=False)
class _Block(Block):
    """Both parts of a page are read for a key: `part` gives them under their names."""

    def part(self, prefix: str) -> Stored:
        parts = {name: Block.part(self, name) for name in ("k.", "v.")}
        return {f"{name}{k}": t for name, part in parts.items() for k, t in part.items()}


@dataclass(frozen=True, eq=False)
class _Tier(TierView):
    """Pages of latents and keys, as keys [c, k] and values c."""

    codecs: Any  # what attention asks of a pair

    def block(self, start: int, stop: int) -> Block:
        return _Block(self.pages, start, stop, self.base)

    def stored(self, block: Block) -> tuple[Stored, Stored]:
        both = block.part("")
        return both, both

    @cached_property
    def kernel(self) -> Choice:
        return Choice(None, "latents of all heads (MLA)")


@dataclass(frozen=True)
class _Keys:
    """Reads [c, k]."""

    pair: tuple[Codec, Codec]
    site: Literal["k_post"] = "k_post"
    joint: bool = False
    expansion: None = None  # no kernel rebuilds them
    constant: None = None  # MLA has no biases

    def absorb(self, query: Tensor) -> None:
        return None

    def reads(self, tokens: int) -> None:
        return None

    def decode(self, stored: Stored, heads: int) -> Float[Tensor, "b 1 t c"]:
        latents, keys = (under(stored, name) for name in ("k.", "v."))
        return torch.cat([self.pair[0].decode(latents, heads), self.pair[1].decode(keys, heads)], 3)


@dataclass(frozen=True)
class _Values:
    """Reads c."""

    pair: tuple[Codec, Codec]
    site: Literal["v"] = "v"
    joint: bool = False

    @property
    def width(self) -> int:
        return self.pair[0].width

    def unpack(self, stored: Stored) -> Float[Tensor, "b 1 t r"]:
        return self.pair[0].decode(under(stored, "k."), 1)

    def expand(self, latent: Tensor, heads: int) -> Tensor:
        return latent

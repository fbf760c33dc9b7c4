"""An attention backend of vLLM over kvshrink's pages: any decoder of plain attention, any method of fixed bytes a page.

A page of a layer is one state of so many bytes; the exact tokens are in a cache layer beside it (window.py). All
requests that decode are one batch; a prompt is read by itself.
"""

from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl, AttentionMetadataBuilder, MultipleOf
from vllm.v1.kv_cache_layout import KVCacheLayout

from kvshrink.cache.attend import attend, rebuild
from kvshrink.kernels.decode import MOST_ROWS
from kvshrink.serve.pool import Places, PoolRows, Reading, pages_of, rows_at
from kvshrink.serve.records import Alike
from kvshrink.serve.vllm.specs import PAGE
from kvshrink.serve.vllm.window import WindowLayer

FEW = 16  # new tokens of a request up to which stored pages are read as they are
NAME = "CUSTOM"  # vLLM's own name for what is not its own


@dataclass
class Step:
    """One step's requests: where their new tokens begin, their lengths, and their tables of one pool."""

    starts: list[int]
    lengths: list[int]
    table: np.ndarray
    slots: Tensor
    size: int
    known: dict[Any, Any] = field(default_factory=dict)  # what all layers of the step share

    @property
    def count(self) -> int:
        return self.starts[-1]

    @cached_property
    def places(self) -> tuple[Tensor | None, Tensor, Tensor]:
        """(which new tokens have a place, their blocks, their slots); padding of a step has none."""
        there = self.slots >= 0
        every = bool(there.all())
        slots = self.slots if every else self.slots[there]
        return None if every else there, slots // self.size, slots % self.size


class KVShrinkBuilder(AttentionMetadataBuilder[Step]):
    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.size = kv_cache_spec.block_size

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Step:
        given = common_attn_metadata
        count = given.num_reqs
        starts, lengths = given.query_start_loc_cpu[: count + 1].tolist(), given.seq_lens[:count].tolist()
        table = given.block_table_tensor[:count].cpu().numpy()
        return Step(starts, lengths, table, given.slot_mapping[: starts[-1]].long(), self.size)


class KVShrinkBackend(AttentionBackend):
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.bfloat16, torch.float16]
    forward_includes_kv_cache_update = True

    @staticmethod
    def get_name() -> str:
        return NAME

    @staticmethod
    def get_impl_cls() -> type["KVShrinkImpl"]:
        return KVShrinkImpl

    @staticmethod
    def get_builder_cls() -> type[KVShrinkBuilder]:
        return KVShrinkBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [MultipleOf(PAGE)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.BLHNC,)  # block by block: layers of different bytes share a pool

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type == "decoder"


@dataclass
class Pages:
    """What an attention layer is given: its records, where its exact tokens are, and the rule of prompts."""

    records: Alike
    window_layer: WindowLayer
    window: int
    sinks: int
    by_window: bool


class KVShrinkImpl(AttentionImpl[Step]):
    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        *args: Any,
        logits_soft_cap: float | None = None,
        **kwargs: Any,
    ) -> None:
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads, self.softcap = num_kv_heads or num_heads, logits_soft_cap or None

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Step | None,
        output: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Attention of a step's tokens, [n, heads, d]; their pages are written as they leave the window."""
        if attn_metadata is None:  # a trial of the engine's
            return output.fill_(0)
        pages, codes = layer.kvshrink, attn_metadata
        exact = get_forward_context().attn_metadata[pages.window_layer.prefix]
        pages.window_layer.write(key[: exact.count], value[: exact.count], *exact.places)
        plan = plan_of(codes, exact, pages)
        # before anything is read: a request may have been given, in this step, blocks that another one writes in it
        self._leave(plan, pages, kv_cache)
        for reading, at, places in plan.parts:
            own = query[at] if isinstance(at, slice) else query[at.to(query.device)]
            shape = (reading.rows, reading.new, self.num_heads, self.head_size)
            found = self._attend(own.view(shape).transpose(1, 2), reading, places, pages, kv_cache)
            output[at] = found.transpose(1, 2).reshape(own.shape).to(output.dtype)
        return output

    def _attend(self, query: Tensor, reading: Reading, places: Places, pages: Pages, pool: Tensor) -> Tensor:
        """[b, q, s, d]."""
        rows, d = pages.window_layer.kv_cache, self.head_size
        if reading.new == 1 and query.is_cpu and self.num_heads // self.num_kv_heads <= MOST_ROWS:
            snapshot = reading.snapshot(pool, pages.records, None, PoolRows(rows, places, d))
            first = rows[:1, :, :1]  # for its shape
            return attend(query, first[..., :d], first[..., d:], None, self.scale, self.softcap, snapshot)
        keys, values = places.rows(rows, d)
        if reading.pages.any():
            sinks = rows_at(rows, places.sinks, d) if pages.sinks else None
            snapshot = reading.snapshot(pool, pages.records, sinks)
            if reading.new <= FEW or self.softcap is not None:
                return attend(query, keys, values, None, self.scale, self.softcap, snapshot)
            # a long part of a prompt: pages are read once, not once for each query
            keys, values = rebuild(snapshot, keys, values)
        elif self.softcap is not None or reading.starts.any():
            snapshot = reading.snapshot(pool, pages.records, None)
            return attend(query, keys, values, None, self.scale, self.softcap, snapshot)
        return _dense(query, keys.contiguous(), values.contiguous(), self.scale)

    def _leave(self, plan: "Plan", pages: Pages, pool: Tensor) -> None:
        if plan.leaving is None:
            return
        places, first, (block, inner) = plan.leaving
        keys, values = rows_at(pages.window_layer.kv_cache, places, self.head_size)
        packed = pages.records.pack(keys, values, first.to(keys.device))
        pool[block.to(pool.device), 0, inner.to(pool.device), : packed.shape[-1]] = packed[:, 0]


@dataclass
class Plan:
    """A step's readings: what is read, which of the step's tokens read it, where exact tokens are; a request's parts
    one after the other. The same for all layers that share a table of exact tokens."""

    parts: list[tuple[Reading, Any, Places]]

    @cached_property
    def leaving(self) -> tuple[tuple[Tensor, Tensor], Tensor, tuple[Tensor, Tensor]] | None:
        """Of all pages that leave a window: (block, slot) [p, page] of their tokens, their first tokens [p], and
        (block, record in it) [p] where they go. None: of none."""
        each = [(r, p) for r, _, p in self.parts if len(r.leaving[0])]
        if not each:
            return None
        places, records = (
            [torch.cat(x) for x in zip(*found, strict=True)]
            for found in ([p.leaving for _, p in each], [r.leaving_records for r, _ in each])
        )
        first = torch.cat([torch.from_numpy(r.leaving[1] * PAGE) for r, _ in each])
        return (places[0], places[1]), first, (records[0], records[1])


def plan_of(codes: Step, exact: Step, pages: Pages) -> Plan:
    """Readings are worked out once a step, and places once for each table."""
    key = pages.window, pages.sinks, pages.by_window
    if key not in codes.known:
        codes.known[key] = _readings(codes, pages)
    if key not in exact.known:
        exact.known[key] = Plan([(r, at, Places(r, exact.table[rows])) for r, at, rows in codes.known[key]])
    found: Plan = exact.known[key]
    return found


def _readings(codes: Step, pages: Pages) -> list[tuple[Reading, Any, list[int]]]:
    new = np.diff(codes.starts)
    more = (codes.size, pages.window, PAGE, pages.sinks)
    found: list[tuple[Reading, Any, list[int]]] = []
    single = [i for i, count in enumerate(new) if count == 1]
    if single:
        lengths, begins = ([x[i] for i in single] for x in (codes.lengths, codes.starts))
        found.append((Reading(lengths, 1, codes.table[single], *more), torch.tensor(begins), single))
    for i in (i for i, count in enumerate(new) if count > 1):
        end, first = codes.lengths[i], codes.lengths[i] - int(new[i])
        cuts = [first, *(_cuts(first, end, pages.window) if pages.by_window else ()), end]
        for a, b in pairwise(cuts):
            begin = codes.starts[i] + a - first
            reading = Reading([b], b - a, codes.table[i : i + 1], *more)
            found.append((reading, slice(begin, begin + b - a), [i]))
    return found


def _cuts(first: int, end: int, window: int) -> list[int]:
    """Where, of these tokens, one sees another page as stored."""
    seen = pages_of(np.arange(first, end), window, PAGE)
    return [first + int(n) for n in np.nonzero(np.diff(seen))[0] + 1]


def _dense(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Causal attention of the last tokens to all, aligned at their end."""
    new, width = query.shape[2], keys.shape[2]
    mask = None
    if 1 < new < width:
        mask = torch.ones(new, width, dtype=torch.bool, device=query.device).tril(width - new)
    causal = mask is None and new > 1
    return F.scaled_dot_product_attention(query, keys, values, mask, is_causal=causal, scale=scale, enable_gqa=True)

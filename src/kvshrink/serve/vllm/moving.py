"""The worker's half of the connector: blocks of the pool to files and back, in threads of their own."""

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

import torch
from torch import Tensor

from kvshrink.serve.prefixes import PrefixStore
from kvshrink.serve.records import PageRecords
from kvshrink.serve.vllm.blocks import LayerBlocks
from kvshrink.serve.vllm.planning import Block
from kvshrink.store.reason import line

log = logging.getLogger(__name__)
TOGETHER = 16  # blocks that are encoded or decoded at once
PATIENCE = 0.02  # seconds that an engine with nothing else to do waits for a load at a time
WAITING = 2**30  # bytes of rows that may wait to be written; what comes beyond is not kept


class Mover:
    """records: None where rows are kept as they are. exact: blocks of a request, from the first, that are so anyway."""

    def __init__(
        self, store: PrefixStore, layers: dict[int, tuple[int, LayerBlocks]], records: PageRecords | None, exact: int
    ) -> None:
        self.store, self.layers, self.records, self.exact = store, layers, records, exact
        self.tokens = next(iter(layers.values()))[1].tokens
        self.loader, self.saver = (ThreadPoolExecutor(1, f"kvshrink-{name}") for name in ("load", "save"))
        self.loading: dict[str, Future[bool]] = {}
        rows = [
            torch.Size(shape).numel() * layer.pool.itemsize for _, layer in layers.values() for shape in layer.shapes
        ]
        self.sizes = {True: sum(rows), False: 0 if records is None else self.tokens // records.page * records.nbytes}
        self.waiting, self.dropped, self._lock = 0, 0, threading.Lock()

    # --- loads ---

    def load(self, name: str, blocks: Sequence[Block]) -> None:
        """Begin to fill a request's blocks."""
        self.loading[name] = self.loader.submit(self._load, list(blocks))

    def loaded(self, idle: bool) -> dict[str, bool]:
        """Requests whose loads have ended since the last call, and whether all is there. idle: nothing else is to be
        done, and the engine would ask again at once, which takes the processor from the load."""
        if idle and self.loading:
            wait(self.loading.values(), PATIENCE, return_when=FIRST_COMPLETED)
        done = [name for name, future in self.loading.items() if future.done()]
        return {name: self.loading.pop(name).result() for name in done}

    @torch.inference_mode()
    def _load(self, blocks: list[Block]) -> bool:
        """Whether all blocks were filled; what is of no use is deleted, so that it is not asked for again."""
        part: list[Block] = []
        try:
            for at in range(0, len(blocks), TOGETHER):
                part = blocks[at : at + TOGETHER]
                found = {block.key: self.store.get(block.key) for block in part}
                if any(data is None for data in found.values()):
                    return False
                for exact in (True, False):
                    own = [block for block in part if self._exact(block) == exact]
                    contents = [data for block in own if (data := found[block.key]) is not None]
                    if wrong := next((len(data) for data in contents if len(data) != self.sizes[exact]), None):
                        raise ValueError(f"a block of {wrong} bytes, not {self.sizes[exact]}")
                    if own:
                        self._write(own, contents, exact)
        except Exception as error:  # whatever a file or a codec does, the engine computes the tokens itself
            log.warning("kvshrink: a stored prefix cannot be read (%s). It is computed again.", line(error))
            for block in part:
                self.store.drop(block.key)
            return False
        return True

    def _write(self, blocks: list[Block], contents: list[bytes], exact: bool) -> None:
        data = torch.stack([torch.frombuffer(bytearray(content), dtype=torch.uint8) for content in contents])
        rows = self._plain(data) if exact else self._decoded(data, blocks)
        for i, (group, layer) in self.layers.items():
            keys, values = rows[i]
            here = [n for n, block in enumerate(blocks) if block.ids[group]]  # 0: out of a sliding window
            if here:
                layer.write([blocks[n].ids[group] for n in here], keys[here], values[here])

    # --- saves ---

    @torch.inference_mode()
    def save(self, blocks: Sequence[Block]) -> None:
        """Copy blocks out of the pool, and begin to write them."""
        for at in range(0, len(blocks), TOGETHER):
            part = list(blocks[at : at + TOGETHER])
            rows = {i: layer.read([b.ids[group] for b in part]) for i, (group, layer) in self.layers.items()}
            size = sum(x.nbytes for pair in rows.values() for x in pair)
            with self._lock:
                if self.waiting + size > WAITING:
                    self.dropped += len(part)
                    continue
                self.waiting += size
            self.saver.submit(self._save, part, rows, size)

    @torch.inference_mode()
    def _save(self, blocks: list[Block], rows: dict[int, tuple[Tensor, Tensor]], size: int) -> None:
        try:
            for exact in (True, False):
                own = [n for n, block in enumerate(blocks) if self._exact(block) == exact]
                if not own:
                    continue
                part = {i: (keys[own], values[own]) for i, (keys, values) in rows.items()}
                data = self._flat(part) if exact else self._encoded(part, [blocks[n] for n in own])
                for n, content in zip(own, data, strict=True):
                    self.store.put(blocks[n].key, content.numpy().tobytes())
        except Exception as error:  # a cache that cannot be kept is no failure of the engine's
            log.warning("kvshrink: %d blocks cannot be kept (%s).", len(blocks), line(error))
        finally:
            with self._lock:
                self.waiting -= size

    def close(self) -> None:
        """Write what waits, then stop."""
        for pool in (self.loader, self.saver):
            pool.shutdown(wait=True)

    # --- forms ---

    def _exact(self, block: Block) -> bool:
        return self.records is None or block.index < self.exact

    def _first(self, blocks: list[Block]) -> Tensor:
        return torch.tensor([block.index * self.tokens for block in blocks])

    def _encoded(self, rows: dict[int, tuple[Tensor, Tensor]], blocks: list[Block]) -> Tensor:
        assert self.records is not None
        return self.records.pack(rows, self._first(blocks))

    def _decoded(self, data: Tensor, blocks: list[Block]) -> dict[int, tuple[Tensor, Tensor]]:
        assert self.records is not None
        return self.records.unpack(data, self._first(blocks))

    def _flat(self, rows: dict[int, tuple[Tensor, Tensor]]) -> Tensor:
        return torch.cat([x.flatten(1).view(torch.uint8) for pair in rows.values() for x in pair], 1)

    def _plain(self, data: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
        at, found = 0, {}
        for i, (_, layer) in self.layers.items():
            pair: list[Any] = []
            for shape in layer.shapes:
                size = torch.Size(shape).numel() * layer.pool.itemsize
                pair.append(data[:, at : at + size].contiguous().view(layer.pool.dtype).view(-1, *shape))
                at += size
            found[i] = pair[0], pair[1]
        return found

"""What transformers asks of a cache layer, for all that one holds: lengths, crops, batch operations, moves."""

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvshrink.cache.body import Body
from kvshrink.cache.sinks import Sinks
from kvshrink.cache.step import Staged
from kvshrink.cache.window import Window
from kvshrink.errors import CacheError
from kvshrink.methods._roles import Method
from kvshrink.store.inference import outside_inference_mode
from kvshrink.store.tokens import TokenTable


class RowsLayer(CacheLayerMixin):
    """Rows of [sinks | body | window]."""

    is_sliding = False
    is_croppable = True
    is_compileable = False
    supports_early_init = False

    method: Method
    table: TokenTable
    window: Window
    sinks: Sinks
    body: Body
    staged: Staged | None
    device: torch.device
    seen: int
    whole: bool  # False while, and after, a change that did not come to its end

    @abstractmethod
    def _clear(self) -> None:
        """Hold nothing."""

    @property
    def fixed(self) -> int:
        """Bytes that a full cache holds of the layer besides keys and values."""
        return 0

    def join_states(self, layers: Sequence["RowsLayer"]) -> None:
        """Take what these hold besides keys and values, row after row."""

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def check_crop(self, count: int) -> None:
        """Raise CacheError if the last `count` tokens cannot be taken back."""
        if count > self.seen:
            raise CacheError(f"cannot crop {count} tokens: the cache holds {self.seen}. Crop fewer or call reset().")
        held = self.window.count + (0 if self.body.chooses else self.body.tokens)
        if self.body.drops and held < count < self.seen:
            raise CacheError(
                f"cannot crop {count} tokens: {type(self.method).__name__} holds only the last {held} "
                "and dropped what came before. Use a larger window."
            )

    @outside_inference_mode
    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens (a negative count). A page that is cut stays short; nothing is encoded again."""
        count = abs(tokens_to_remove)
        self.check_crop(count)
        if count == 0:
            return
        if count == self.seen:
            self.reset()
            return
        whole, self.whole = self.whole, False
        self.seen -= count
        self.window.crop(count)
        lengths = np.maximum(0, self.seen - (0 if self.table.shifts is None else self.table.shifts))
        lengths = np.broadcast_to(lengths, (self.table.rows,)).astype(np.int64)
        self.body.crop(lengths)
        self.sinks.crop(torch.from_numpy(lengths))
        self.whole = whole

    def reset(self) -> None:
        self._clear()
        self.is_initialized = False
        self.staged = None

    @outside_inference_mode
    def select(self, index: Tensor) -> None:
        """Keep these rows, in this order; a row may come more than once."""
        whole, self.whole = self.whole, False
        for part in (self.window, self.sinks, self.body):
            part.select(index)
        self.whole = whole

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.select(torch.arange(self.table.rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.select(indices)

    def offload(self) -> None:
        self._move("cpu")

    def prefetch(self) -> None:
        if self.is_initialized:
            self._move(self.device)

    @outside_inference_mode
    def _move(self, device: torch.device | str) -> None:
        whole, self.whole = self.whole, False
        for part in (self.window, self.sinks, self.body):
            part.to(device)
        self.whole = whole

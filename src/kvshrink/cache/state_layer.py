"""A layer with a recurrent state and attention side by side (Falcon-H1): keys and values are shrunken, the state
stays as transformers makes it."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer

from kvshrink.cache.drift import DriftWatch
from kvshrink.cache.layer import CompressedLayer
from kvshrink.cache.passed import check_crop, clear_states, restore_states, select_states, states_of, states_state
from kvshrink.cache.rows_layer import RowsLayer
from kvshrink.store.bytes import Held, nbytes
from kvshrink.store.names import under
from kvshrink.store.tokens import TokenTable


class StateAndCompressedLayer(LinearAttentionLayer, CompressedLayer):  # type: ignore[misc, override]  # as transformers'
    """states: how many the layer has."""

    is_compileable = False
    supports_early_init = False

    def __init__(self, states: int, *given: Any) -> None:
        CompressedLayer.__init__(self, *given)
        LinearAttentionLayer.__init__(self, number_of_states=states)

    def like(
        self, table: TokenTable, watch: DriftWatch | None, base: CompressedLayer | None
    ) -> "StateAndCompressedLayer":
        return StateAndCompressedLayer(self.number_of_states, self.method, self.shape, self.tiers, table, watch, base)

    def join_states(self, layers: Sequence[RowsLayer]) -> None:
        parts = [states_state(layer)[1] for layer in layers]
        self._take({k: torch.cat([part[k] for part in parts]) for k in parts[0]})

    def _take(self, tensors: dict[str, Tensor]) -> None:
        """States, as `state` gives them; where keys and values are, and of which dtype, is not theirs to say."""
        own = self.device, self.dtype
        restore_states(self, under(tensors, "states."))
        if isinstance(own[0], torch.device):
            self.device, self.dtype = own

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Keys and values come by their places, states by their names, as in transformers' own."""
        (CompressedLayer if args else LinearAttentionLayer).lazy_initialization(self, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "StateAndCompressedLayer":
        fork = CompressedLayer.__deepcopy__(self, memo)
        for name, value in vars(self).items():
            if isinstance(value, dict):  # states, and what is said of each
                setattr(fork, name, copy.deepcopy(value, memo))
        assert isinstance(fork, StateAndCompressedLayer)
        return fork

    def reset(self) -> None:
        clear_states(self)
        CompressedLayer.reset(self)

    def select(self, index: Tensor) -> None:
        CompressedLayer.select(self, index)
        select_states(self, index)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.select(beam_idx)

    def check_crop(self, count: int) -> None:
        check_crop(self, count)
        CompressedLayer.check_crop(self, count)

    def crop(self, tokens_to_remove: int) -> None:
        if self.record_past:
            LinearAttentionLayer.crop(self, tokens_to_remove)
        CompressedLayer.crop(self, tokens_to_remove)

    def offload(self) -> None:
        LinearAttentionLayer.offload(self)
        CompressedLayer.offload(self)

    def prefetch(self) -> None:
        LinearAttentionLayer.prefetch(self)
        CompressedLayer.prefetch(self)

    def tensors(self) -> list[Tensor]:
        return [*CompressedLayer.tensors(self), *states_of(self).values()]

    def held(self) -> Held:
        return CompressedLayer.held(self) + Held(window=nbytes(states_of(self).values()))

    @property
    def fixed(self) -> int:
        """Bytes that a full cache holds of the layer besides keys and values."""
        return nbytes(states_of(self).values())

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        values, tensors = CompressedLayer.state(self)
        more, states = states_state(self)
        return values | more, tensors | states

    def restore(self, values: dict[str, Any], tensors: dict[str, Tensor], empty: Sequence[Any]) -> None:
        CompressedLayer.restore(self, values, tensors, empty)
        self._take(tensors)

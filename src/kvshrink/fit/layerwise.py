"""Run a model layer by layer over all calibration rows: one buffer of hidden states, one layer's weights at a time.

The model's own forward is asked once how it calls its layers (masks, rotary embeddings, scaled embeddings): stand-ins
note the arguments and pass the hidden states on. Rows have one length and no padding, so for most models the arguments
are the same for every batch.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from kvshrink.attach.families import decoder_layers, layer_list, text_tower
from kvshrink.attach.inputs import by_name
from kvshrink.errors import UnsupportedModelError
from kvshrink.fit.source import InMemory, OnDisk

Watch = Callable[[nn.Module, dict], None]  # called with a self-attention module and its keyword arguments


class _Stop(Exception):
    pass


class _Recorder(nn.Module):
    """Takes a decoder layer's place: notes how it is called and changes nothing."""

    def __init__(self, layer: nn.Module, last: bool) -> None:
        super().__init__()
        self.__dict__["layer"] = layer  # not a submodule
        self.last = last

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        given = dict(by_name(self.__dict__["layer"], (hidden_states, *args), kwargs))
        given.pop("hidden_states", None)
        self.seen, self.kwargs = hidden_states, given
        if self.last:
            raise _Stop
        return hidden_states

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["layer"], name)


class LayerRunner:
    """Hidden states of all rows, moved through the model one layer at a time."""

    def __init__(self, source: InMemory | OnDisk, rows: Tensor, batch: int) -> None:
        self.source, self.batch, self.rows = source, batch, rows
        self.kwargs: dict[int, list[dict]] = {}  # by the row that a batch begins with, per layer
        self.hidden = self._embed()

    @property
    def layers(self) -> int:
        return len(decoder_layers(self.source.model))

    @torch.no_grad()
    def _embed(self) -> Tensor:
        decoder = text_tower(self.source.model)
        holder, name = layer_list(self.source.model)
        real = getattr(holder, name)
        stand_ins = nn.ModuleList([_Recorder(layer, i == len(real) - 1) for i, layer in enumerate(real)])
        hidden = None
        try:
            setattr(holder, name, stand_ins)
            with self.source.embeddings():
                device = self.source.model.get_input_embeddings().weight.device
                for at in range(0, len(self.rows), self.batch):
                    part = self.rows[at : at + self.batch].to(device)
                    try:
                        decoder(input_ids=part, use_cache=False)
                    except _Stop:
                        pass
                    first: Any = stand_ins[0]  # a module to ModuleList
                    if first.seen.shape[:-1] != part.shape:
                        raise UnsupportedModelError(
                            f"{type(decoder).__name__} gives its layers {tuple(first.seen.shape)}, several streams "
                            "of rows. It cannot be fitted layer by layer. Use a method that needs no fit."
                        )
                    if hidden is None:
                        hidden = torch.empty(
                            *self.rows.shape, first.seen.shape[-1], dtype=first.seen.dtype, device=device
                        )
                    hidden[at : at + len(part)] = first.seen
                    self.kwargs[at] = self._shared(len(part), [r.kwargs for r in stand_ins])
        finally:
            setattr(holder, name, real)
        assert hidden is not None
        return hidden

    def _shared(self, size: int, found: list[dict]) -> list[dict]:
        """What the layers of a batch were called with: an earlier batch's, where it says the same of as many rows."""
        for at, known in self.kwargs.items():
            if min(self.batch, len(self.rows) - at) == size and _same(known, found):
                return known
        return found

    @torch.no_grad()
    def run(self, index: int, layer: nn.Module, watch: Watch | None = None, attention: Any = None) -> None:
        """Move all rows through one loaded layer. `watch` sees what its attention is called with."""
        hook = None
        if watch is not None:
            hook = attention.register_forward_pre_hook(
                lambda m, args, kwargs: watch(m, dict(by_name(m, args, kwargs))), with_kwargs=True
            )
        try:
            for part in self._slices():
                x = self.hidden[part]
                out = layer(x, **self.kwargs[part.start][index])
                self.hidden[part] = out[0] if isinstance(out, tuple) else out
        finally:
            if hook is not None:
                hook.remove()

    def _slices(self) -> Iterator[slice]:
        for at in range(0, len(self.rows), self.batch):
            yield slice(at, min(at + self.batch, len(self.rows)))


def _same(a: Any, b: Any) -> bool:
    """Whether two arguments say the same; a model may give its layers something of each token (Gemma 3n, 4)."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and a.equal(b)
    if isinstance(a, dict) or isinstance(b, dict):  # which layers write to (shared_kv_states)
        return a is b
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a is b or a == b)

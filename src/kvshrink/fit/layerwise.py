"""Run a model layer by layer over all calibration rows: one buffer of hidden states, one layer's weights at a time.

The model's own forward is asked once how it calls its layers (masks, rotary embeddings, scaled embeddings): stand-ins
note the arguments and pass the hidden states on. Rows have one length and no padding, so the arguments are the same
for every batch.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

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
        self.seen, self.kwargs = hidden_states, kwargs
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
        self.kwargs: dict[int, list[dict]] = {}  # by batch size, per layer
        self.hidden = self._embed()

    @property
    def layers(self) -> int:
        return len(self.source.model.get_decoder().layers)

    @torch.no_grad()
    def _embed(self) -> Tensor:
        decoder = self.source.model.get_decoder()
        real = decoder.layers
        stand_ins = nn.ModuleList([_Recorder(layer, i == len(real) - 1) for i, layer in enumerate(real)])
        hidden = None
        try:
            decoder.layers = stand_ins
            with self.source.embeddings():
                device = self.source.model.get_input_embeddings().weight.device
                for at in range(0, len(self.rows), self.batch):
                    part = self.rows[at : at + self.batch].to(device)
                    try:
                        decoder(input_ids=part, use_cache=False)
                    except _Stop:
                        pass
                    first: Any = stand_ins[0]  # a module to ModuleList
                    if hidden is None:
                        hidden = torch.empty(
                            *self.rows.shape, first.seen.shape[-1], dtype=first.seen.dtype, device=device
                        )
                    hidden[at : at + len(part)] = first.seen
                    self.kwargs.setdefault(len(part), [r.kwargs for r in stand_ins])
        finally:
            decoder.layers = real
        assert hidden is not None
        return hidden

    @torch.no_grad()
    def run(self, index: int, layer: nn.Module, watch: Watch | None = None) -> None:
        """Move all rows through one loaded layer. `watch` sees its attention's input."""
        attention = next(m for m in layer.modules() if hasattr(m, "o_proj"))
        hook = None
        if watch is not None:
            hook = attention.register_forward_pre_hook(lambda m, args, kwargs: watch(m, kwargs), with_kwargs=True)
        try:
            for part in self._slices():
                x = self.hidden[part]
                out = layer(x, **self.kwargs[len(x)][index])
                self.hidden[part] = out[0] if isinstance(out, tuple) else out
        finally:
            if hook is not None:
                hook.remove()

    def _slices(self) -> Iterator[slice]:
        for at in range(0, len(self.rows), self.batch):
            yield slice(at, min(at + self.batch, len(self.rows)))

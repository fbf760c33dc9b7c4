"""The exact part of a layer: the recent window and the sinks, in the model's own dtype."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from kvshrink.shapes import Bool, Float, Int


class Window:
    """The last tokens, in a buffer of window + page slots that is taken once.

    It fills up, then gives whole pages away from its old end, so that at least `window` tokens stay. Slots move down
    only then, once a page: the exact tokens are one contiguous view for every step between.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.count = 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def view(self) -> tuple[Float[Tensor, "b h w d"], Float[Tensor, "b h w d"]]:
        assert self.keys is not None, "the window is not initialised"
        assert self.values is not None
        return self.keys[:, :, : self.count], self.values[:, :, : self.count]

    def extend(self, keys: Float[Tensor, "b h s d"], values: Float[Tensor, "b h s d"]) -> tuple[Tensor, Tensor]:
        """Old and new tokens together: in place if they fit, else joined for this step only; then call `keep`."""
        if self.keys is None or self.values is None:
            b, h, _, d = keys.shape
            self.keys = keys.new_zeros(b, h, self.capacity, d)
            self.values = values.new_zeros(b, h, self.capacity, values.shape[3])
        end = self.count + keys.shape[2]
        if end > self.capacity:
            if self.count == 0:
                return keys, values
            old_keys, old_values = self.view()
            return torch.cat([old_keys, keys], 2), torch.cat([old_values, values], 2)
        self.keys[:, :, self.count : end] = keys
        self.values[:, :, self.count : end] = values
        self.count = end
        return self.view()

    def keep(self, keys: Float[Tensor, "b h w d"], values: Float[Tensor, "b h w d"]) -> None:
        """Hold just these tokens. They must not be views of the window itself."""
        assert self.keys is not None
        assert self.values is not None
        self.count = keys.shape[2]
        self.keys[:, :, : self.count] = keys
        self.values[:, :, : self.count] = values

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.keys is not None and self.values is not None:
            self.keys, self.values = change(self.keys), change(self.values)

    def tensors(self) -> dict[str, Tensor]:
        return {} if self.keys is None or self.values is None else {"keys": self.keys, "values": self.values}

    def state(self) -> dict[str, Tensor]:
        """The tokens that are held, without the room for more."""
        return {} if self.keys is None else dict(zip(("keys", "values"), self.view(), strict=True))

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """From what `state` gave."""
        self.keys = self.values = None
        self.count = 0
        if tensors:
            b, h, _, d = tensors["keys"].shape
            self.keys = tensors["keys"].new_zeros(b, h, self.capacity, d)
            self.values = tensors["values"].new_zeros(b, h, self.capacity, tensors["values"].shape[3])
            self.keep(tensors["keys"], tensors["values"])


class Sinks:
    """The first `size` real tokens of each row, kept when they leave the window. Rows differ if they are padded."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.full = size == 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.columns: Tensor | None = None  # int32 [b, size], -1 where there is none yet

    def wanted(self, real: Bool[Tensor, "b c"], first: int) -> Bool[Tensor, "b m"]:
        """Which of the columns from `first` on are sinks, given which of all columns are real tokens."""
        order = real.cumsum(1)  # 1 for a row's first real token
        return (real & (order <= self.size))[:, first:]

    def capture(self, keys: Tensor, values: Tensor, first: int, wanted: Bool[Tensor, "b m"]) -> None:
        """Take the wanted tokens of keys and values [b, h, m, d], which cover the columns from `first` on."""
        if self.keys is None or self.values is None or self.columns is None:
            b, h, _, d = keys.shape
            self.keys, self.values = (
                keys.new_zeros(b, h, self.size, d),
                values.new_zeros(b, h, self.size, values.shape[3]),
            )
            self.columns = torch.full((b, self.size), -1, dtype=torch.int32, device=keys.device)
        row, at = wanted.nonzero(as_tuple=True)
        # a row's next free slot, counted on from the sinks that it has
        slot = ((self.columns >= 0).sum(1, keepdim=True) + wanted.cumsum(1) - 1)[row, at]
        self.keys[row, :, slot] = keys[row, :, at]
        self.values[row, :, slot] = values[row, :, at]
        self.columns[row, slot] = (at + first).int()
        self.full = bool((self.columns >= 0).all())

    def before(self, column: int) -> Bool[Tensor, "b size"]:
        """Which slots hold a token that sits before the column."""
        assert self.columns is not None
        return (self.columns >= 0) & (self.columns < column)

    def last(self) -> Int[Tensor, "b 1"]:
        """Column of each row's last sink; everything up to it is a pad or a sink."""
        assert self.columns is not None
        return self.columns.amax(1, keepdim=True)

    def others(self, valid: Bool[Tensor, "b t"] | None, column: int, count: int) -> Bool[Tensor, "b t"] | None:
        """Of `count` tokens from a column on, those that are no pads, and no sinks, which padding leaves in pages."""
        if valid is None or self.columns is None or not self.size:
            return valid
        return valid & (torch.arange(column, column + count, device=valid.device) > self.last())

    def crop(self, length: int) -> None:
        if self.columns is not None and self.size:
            self.columns = self.columns.masked_fill(self.columns >= length, -1)
            self.full = bool((self.columns >= 0).all())

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.keys is not None and self.values is not None and self.columns is not None:
            self.keys, self.values, self.columns = change(self.keys), change(self.values), change(self.columns)

    def tensors(self) -> dict[str, Tensor]:
        if self.keys is None or self.values is None or self.columns is None:
            return {}
        return {"keys": self.keys, "values": self.values, "columns": self.columns}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """From what `tensors` gave."""
        self.keys, self.values, self.columns = tensors["keys"], tensors["values"], tensors["columns"]
        self.full = bool((self.columns >= 0).all())

"""The recent tokens of a layer: exact, in the model's own dtype, or at 8 bits (methods/_window.py)."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from kvshrink.methods._window import WindowForm
from kvshrink.shapes import Float, Int
from kvshrink.store.growth import slots_for


class Shared(NamedTuple):
    """Tokens that several rows have in common, as beams have their prompt's, as they are stored. rows: which row of
    these each row of the batch reads, [b]."""

    keys: Tensor
    values: Tensor
    rows: Int[Tensor, " b"]

    @property
    def tokens(self) -> int:
        return self.keys.shape[2]

    def selected(self, index: Int[Tensor, " n"]) -> "Shared":
        """For these rows of the batch; what none of them reads is let go."""
        rows = self.rows[index.to(self.rows.device)]
        used, rows = rows.unique(return_inverse=True)
        whole = len(used) == len(self.keys)
        return Shared(self.keys, self.values, rows) if whole else Shared(self.keys[used], self.values[used], rows)


class Window:
    """The last tokens, in a buffer that grows to window + page slots. They are one contiguous view for every step
    between two pages; the step in which a page leaves takes another buffer.

    starts: a row's first slot, where rows differ (a batch of joined caches); None: 0 for all.
    form: how tokens are stored; all tensors are in it but what `view` and `put` give. The layer changes it (`hold`):
          sinks come out of the window, and are exact, so it is until it has given all of them.
    """

    def __init__(self, capacity: int, form: WindowForm) -> None:
        self.capacity, self.form = capacity, form
        self.starts: np.ndarray | None = None
        self.shared: Shared | None = None
        self.own = 0  # tokens in the buffer, behind the shared ones
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.scores: Tensor | None = None  # importance [b, h, w] of the tokens, where a scorer adds it up
        self.lent = False  # whether a fork reads the same buffer: it is copied before the next write

    @property
    def count(self) -> int:
        return self.own + (self.shared.tokens if self.shared is not None else 0)

    def view(self) -> tuple[Float[Tensor, "b h w d"], Float[Tensor, "b h w e"]]:
        """The tokens' keys and values as attention reads them."""
        keys, values = self.stored()
        return self.form.rows(keys), self.form.rows(values)

    def hold(self, form: WindowForm) -> None:
        """Store tokens so from now on."""
        if form.bits == self.form.bits:
            return
        keys, values, shared, old = self.keys, self.values, self.shared, self.form
        self.form = form
        if shared is not None:
            self.shared = Shared(form.stored(old.rows(shared.keys)), form.stored(old.rows(shared.values)), shared.rows)
        if keys is not None and values is not None:
            other = [form.stored(old.rows(x[:, :, : self.own])) for x in (keys, values)]
            _write(self._take(other[0], other[1], keys.shape[2]), 0, other[0], other[1])

    def stored(self) -> tuple[Tensor, Tensor]:
        assert self.keys is not None, "the window is not initialised"
        assert self.values is not None
        keys, values = self.keys[:, :, : self.own], self.values[:, :, : self.own]
        if self.shared is None:
            return keys, values
        rows = self.shared.rows
        return torch.cat([self.shared.keys[rows], keys], 2), torch.cat([self.shared.values[rows], values], 2)

    def put(
        self, keys: Float[Tensor, "b h s d"], values: Float[Tensor, "b h s e"], left: bool
    ) -> tuple[Tensor, Tensor] | None:
        """Add tokens: in place if they fit, then None; else all are joined for this step only, and `keep` must follow.

        left: whether tokens have left the window before, or will in this step.
        """
        if self.keys is None or self.values is None:
            self._take(self.form.stored(keys[:, :, :0]), self.form.stored(values[:, :, :0]), 0)
        end = self.own + keys.shape[2]
        if self.count + keys.shape[2] > self.capacity:
            if self.count == 0:
                return keys, values
            old_keys, old_values = self.view()
            return torch.cat([old_keys, keys], 2), torch.cat([old_values, values], 2)
        room = self._make_room(self.capacity if left and self.shared is None else min(self.capacity, slots_for(end)))
        _write(room, self.own, self.form.stored(keys), self.form.stored(values))
        self.own = end
        return None

    def keep(self, keys: Tensor, values: Tensor, gone: int) -> None:
        """Let the first `gone` of these tokens [b, h, w, d] go, which are all that there are after `put`."""
        self.scores = None if self.scores is None else self.scores[..., gone:].clone()
        if self.starts is not None:
            self.starts = _some(np.maximum(self.starts - gone, 0))
        shared = self.shared
        if shared is not None and gone < shared.tokens and self.count == keys.shape[2]:
            self.shared = Shared(shared.keys[:, :, gone:].clone(), shared.values[:, :, gone:].clone(), shared.rows)
            return
        # what is held moves as it is stored, so that nothing is rounded twice
        fresh = max(gone, self.count)
        parts = [(self.form.stored(keys[:, :, fresh:]), self.form.stored(values[:, :, fresh:]))]
        if gone < self.count:
            held = self.stored()
            parts.insert(0, (held[0][:, :, gone:], held[1][:, :, gone:]))
        room, self.own, self.shared = self._take(*parts[0], self.capacity), 0, None
        for part in parts:
            _write(room, self.own, *part)
            self.own += part[0].shape[2]

    def _take(self, keys: Tensor, values: Tensor, slots: int) -> tuple[Tensor, Tensor]:
        """Room for so many tokens like these stored ones."""
        (b, h, _, d), wide = keys.shape, values.shape[3]
        self.keys, self.values, self.lent = keys.new_empty(b, h, slots, d), values.new_empty(b, h, slots, wide), False
        return self.keys, self.values

    def _make_room(self, slots: int) -> tuple[Tensor, Tensor]:
        """A buffer of at least so many slots that nobody else reads."""
        old_keys, old_values = self.keys, self.values
        assert old_keys is not None
        assert old_values is not None
        if slots > old_keys.shape[2] or self.lent:
            room = self._take(old_keys, old_values, max(slots, old_keys.shape[2]))
            _write(room, 0, old_keys[:, :, : self.own], old_values[:, :, : self.own])
            return room
        return old_keys, old_values

    def crop(self, count: int) -> None:
        """Forget the last `count` tokens, or all that there are."""
        own = min(count, self.own)
        self.own, count = self.own - own, count - own
        if count and self.shared is not None:
            keys, values, rows = self.shared
            stay = max(0, keys.shape[2] - count)
            self.shared = Shared(keys[:, :, :stay].clone(), values[:, :, :stay].clone(), rows) if stay else None
        self.scores = None if self.scores is None else self.scores[..., : self.count].clone()
        if self.starts is not None:
            self.starts = _some(np.minimum(self.starts, self.count))

    def select(self, index: Int[Tensor, " n"]) -> None:
        """Keep these rows, in this order. What rows have in common from now on is held once."""
        if self.keys is None or self.values is None:
            return
        if self.starts is not None:
            self.starts = _some(self.starts[index.cpu().numpy()])
        index = index.to(self.keys.device)
        self.scores = None if self.scores is None else self.scores[index]
        if self.shared is None and self.own and len(index) > len(index.unique()):
            every = torch.arange(len(self.keys), device=index.device)
            keys, values = (x[:, :, : self.own].clone() for x in (self.keys, self.values))
            self.shared, self.own = Shared(keys, values, every), 0
            self._take(self.keys, self.values, 0)
        self.shared = None if self.shared is None else self.shared.selected(index)
        self.keys, self.values, self.lent = self.keys[index], self.values[index], False
        if self.starts is not None and (gone := int(self.starts.min())):  # of rows that are not there any more
            self.keep(*self.view(), gone)

    def fork(self) -> "Window":
        """Another window of the same tokens. Neither copies them before it writes."""
        self.lent = True
        other = Window(self.capacity, self.form)
        vars(other).update(vars(self))
        return other

    @classmethod
    def joined(cls, windows: Sequence["Window"], left: bool) -> "Window":
        """The rows of all, ending together; what stands before a row's tokens is zero."""
        form = next((w.form for w in windows if w.form.bits is None), windows[0].form)
        windows = [w.fork() for w in windows]
        for window in windows:
            window.hold(form)
        other, views = cls(windows[0].capacity, form), [w.stored() for w in windows]
        count = max(w.count for w in windows)
        parts = [[pad(x, (0, 0, count - x.shape[2], 0)) for x in view] for view in views]
        starts = [
            count - w.count + (np.zeros(len(keys), np.int64) if w.starts is None else w.starts)
            for w, (keys, _) in zip(windows, views, strict=True)
        ]
        other.restore({"keys": torch.cat([k for k, _ in parts]), "values": torch.cat([v for _, v in parts])}, left)
        if any(w.scores is not None for w in windows):  # of a prompt that nothing ranked they are 0
            known = [
                k.new_zeros(k.shape[:3], dtype=torch.float32) if w.scores is None else w.scores
                for w, (k, _) in zip(windows, views, strict=True)
            ]
            other.scores = torch.cat([pad(x, (count - x.shape[2], 0)) for x in known])
        other.starts = _some(np.concatenate(starts))
        return other

    def row(self, number: int, left: bool) -> "Window":
        """The tokens of one row alone."""
        other, start = Window(self.capacity, self.form), 0 if self.starts is None else int(self.starts[number])
        keys, values = (x[number : number + 1, :, start:] for x in self.stored())
        scores = {} if self.scores is None else {"scores": self.scores[number : number + 1, :, start:]}
        other.restore({"keys": keys, "values": values} | scores, left)
        return other

    def to(self, device: torch.device | str) -> None:
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys.to(device, non_blocking=True), self.values.to(device, non_blocking=True)
        self.scores = None if self.scores is None else self.scores.to(device, non_blocking=True)
        if self.shared is not None:
            self.shared = Shared(*(t.to(device, non_blocking=True) for t in self.shared))

    def tensors(self) -> dict[str, Tensor]:
        """What is held."""
        own = {} if self.keys is None or self.values is None else {"keys": self.keys, "values": self.values}
        own |= {} if self.scores is None else {"scores": self.scores}
        return own if self.shared is None else own | {f"shared.{k}": t for k, t in self.shared._asdict().items()}

    def add_scores(self, more: Float[Tensor, "b h w"], fade: float = 1.0) -> Float[Tensor, "b h w"]:
        """Importance of the tokens so far, times `fade`, and of the step's, the newest ones behind."""
        old = more.new_zeros(*more.shape[:2], 0) if self.scores is None else self.scores
        self.scores = more + pad(old if fade == 1.0 else old * fade, (0, more.shape[2] - old.shape[2]))
        return self.scores

    def state(self) -> dict[str, Tensor]:
        """The tokens that are held, without the room for more."""
        own = {} if self.keys is None else dict(zip(("keys", "values"), self.stored(), strict=True))
        return own if self.scores is None else own | {"scores": self.scores}

    def restore(self, tensors: Mapping[str, Tensor], left: bool) -> None:
        """From what `state` gave."""
        keys, values = tensors["keys"], tensors["values"]
        self.shared, self.own, self.starts, self.scores = None, keys.shape[2], None, tensors.get("scores")
        room = self._take(keys, values, self.capacity if left else min(self.capacity, slots_for(self.own)))
        _write(room, 0, keys, values)


def _write(room: tuple[Tensor, Tensor], at: int, keys: Tensor, values: Tensor) -> None:
    """Tokens into a buffer, from a slot on."""
    for buffer, rows in zip(room, (keys, values), strict=True):
        buffer[:, :, at : at + rows.shape[2]] = rows


def _some(starts: np.ndarray) -> np.ndarray | None:
    return starts if starts.any() else None

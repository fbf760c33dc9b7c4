"""What may be in the tensors of a saved cache: those that say where something lies, compared with what others imply."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from kvshrink.cache.layer import CompressedLayer
from kvshrink.cache.sinks import Sinks
from kvshrink.cache.state import Schema, require
from kvshrink.kernels.records import Layout
from kvshrink.shapes import Bool
from kvshrink.store.names import under


def check_contents(schema: Schema, state: Mapping[str, Tensor]) -> None:
    """Raise ArtifactError if tensors of the right kind hold what no cache holds."""
    positions = state.get("table.positions", torch.zeros(schema.batch, 0, dtype=torch.int32)).cpu()
    absent = torch.arange(schema.length) < torch.tensor(schema.shifts, dtype=torch.int64)[:, None]
    least = positions.new_full((), -1 if schema.padded else 0).where(~absent, -1) if positions.numel() else positions
    require(bool((positions >= least).all()) and bool((positions[absent] == -1).all()), "table.positions")
    for i, layer in enumerate(schema.layers):
        if isinstance(layer, CompressedLayer):
            Contents(schema, i, layer, positions >= 0).check(under(state, f"layers.{i}."))


class Contents:
    """One layer's tensors. real: which columns of the batch are tokens."""

    def __init__(self, schema: Schema, i: int, layer: CompressedLayer, real: Bool[Tensor, "b c"]) -> None:
        self.layer, self.name, self.real = layer, f"layers.{i}", real
        self.shifts, self.empty = np.array(schema.shifts, np.int64), schema.empty[i]
        window, starts = schema.windows[i]
        self.lengths = schema.length - self.shifts
        exact = np.minimum(self.lengths, window - np.array(starts, np.int64))
        self.left = self.lengths - exact  # of each row's own columns, how many are in the window no more
        require(bool((exact >= 0).all()), f"{self.name}: starts")

    def check(self, own: Mapping[str, Tensor]) -> None:
        layer = self.layer
        shown = self.shown = self._check_sinks(own.get("sinks.columns"))
        sums = own.get("watch.sums")
        require(sums is None or bool((sums.isfinite() & (sums >= 0)).all()), f"{self.name}.watch.sums")
        covered = [np.zeros(n, bool) for n in self.left]
        ends = np.zeros(len(self.left), np.int64)
        for n in reversed(range(len(layer.tiers))):
            name = f"older.{n - 1}" if n else "pages"
            stored = under(own, f"{name}.")
            if stored:  # pages of images have an order of their own
                own_ends = np.zeros_like(ends) if layer.tiers[n].beside else ends
                self._check_pages(f"{self.name}.{name}", n, stored, covered, own_ends)
        for row, (seen, needed) in enumerate(zip(covered, shown, strict=True)):
            first = int(seen.argmax()) if seen.any() else len(seen)
            if layer.body.chooses and not layer.body.holds_every:
                continue
            missing = needed & ~seen
            if layer.body.drops:
                missing = missing[first:]
            require(not missing.any(), f"{self.name}: tokens are missing in row {row}")

    def _check_pages(
        self, name: str, tier: int, stored: Mapping[str, Tensor], covered: list[np.ndarray], ends: np.ndarray
    ) -> None:
        """Tables that name records that are there, pages in order, and what codecs say of the records."""
        layer, page = self.layer, self.layer.method.page
        table, used, first = (stored[k].cpu().numpy().astype(np.int64) for k in ("table", "used", "first"))
        there = table >= 0
        require(bool((table < len(stored["records"])).all() and (table >= -1).all()), f"{name}.table")
        require(bool((there[..., :-1] >= there[..., 1:]).all() and there.any(2).any()), f"{name}.table")
        require(bool((there == (used > 0)).all() and (used <= page).all()), f"{name}.used")
        if "columns" in stored:
            self._check_chosen(name, stored, used)
        for row in range(len(table) if "columns" not in stored else 0):
            for lane in range(table.shape[1]):
                for k in range(int(there[row, lane].sum())):
                    start, stop = first[row, k], first[row, k] + used[row, lane, k]
                    require(bool(ends[row] <= start and stop <= self.left[row]), f"{name}.first")
                    require(not covered[row][start:stop].any(), f"{name}.first")
                    covered[row][start:stop] = True
                    ends[row] = stop
        empty = self.empty[tier]
        assert empty is not None
        layout = Layout.of(empty, table.shape[1])
        records = stored["records"].cpu()[None, None]
        fields = {k: layout._replace(lanes=1).read(k, records) for k in layout.fields}
        for kv, codec in zip("kv", layer.tiers[tier].codecs or (), strict=False):
            part = under(fields, f"{kv}.")
            require(not part or codec.sound(part), f"{name}.records ({'keys' if kv == 'k' else 'values'})")

    def _check_chosen(self, name: str, stored: Mapping[str, Tensor], used: np.ndarray) -> None:
        """Tokens of each lane that have left the window, in order: no pads, no sinks, and no more than pages hold."""
        columns, importance = (stored[k].cpu().numpy() for k in ("columns", "importance"))
        there = columns >= 0
        count = there.reshape(*used.shape, -1).sum(3)
        require(bool((columns >= -1).all() and (count == used).all()), f"{name}.columns")
        require(bool((stored["first"] == 0).all()), f"{name}.first")
        require(not np.isnan(importance[there]).any(), f"{name}.importance")
        for row, (shown, lanes) in enumerate(zip(self.shown, columns, strict=True)):
            for own in lanes:
                own = own[own >= 0]
                require(bool((np.diff(own) > 0).all()), f"{name}.columns")
                require(len(own) == 0 or (own[-1] < len(shown) and bool(shown[own].all())), f"{name}.columns ({row})")

    def _check_sinks(self, columns: Tensor | None) -> list[np.ndarray]:
        """Sinks are the first real tokens of each row. What of the others must be in pages."""
        size, needed = self.layer.sinks.size, []
        right = np.full((len(self.left), size), -1, np.int64)
        for row, (shift, left) in enumerate(zip(self.shifts, self.left, strict=True)):
            real = self.real[row : row + 1, shift : shift + left]
            wanted = Sinks(size).wanted(real, 0)[0].numpy() if size else np.zeros(left, bool)
            right[row, : wanted.sum()] = np.nonzero(wanted)[0]
            needed.append(real[0].numpy() & ~wanted)
        taken = bool((right >= 0).any())
        require((columns is not None) == taken, f"{self.name}.sinks.columns")
        require(columns is None or bool((columns.cpu().numpy() == right).all()), f"{self.name}.sinks.columns")
        return needed

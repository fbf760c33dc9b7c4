"""Which heads look far, and which tokens a model needs: what methods that choose tokens ask during a fit."""

from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor
from tqdm import tqdm

from kvshrink.attach import attached
from kvshrink.attach.families import LayerInfo
from kvshrink.attach.fill import Wanted, prefill
from kvshrink.errors import DataError
from kvshrink.fit.gates import head_gates
from kvshrink.fit.recall import recall_rows, row_length
from kvshrink.fit.spans import span_costs
from kvshrink.methods._token_probe import Needed, Rule, TokenProbe
from kvshrink.methods.quant.rtn import RTN
from kvshrink.shapes import Float, Int

LENGTH = 1024  # tokens of a row
ROWS, TOKENS = 8, 512  # rows that are read again, and tokens of each that are learnt from
LEAST = 1e-4  # of a score, whose logarithm is learnt


@final
class OfTokens(TokenProbe):
    """Of one model and one calibration text."""

    def __init__(
        self, model: Any, infos: Sequence[LayerInfo], rows: Int[Tensor, "rows length"], progress: bool
    ) -> None:
        self.model, self.rows, self.progress = model, rows, progress
        self.infos = {i: info for i, info in enumerate(infos) if info.compressed}
        self.device = next(model.parameters()).device

    def gates(self, sinks: int, recent: int, steps: int) -> Mapping[int, Float[Tensor, " h"]]:
        apart = RTN(window=recent, sinks=sinks)  # a passage lies before the recent tokens, and behind the first
        length = min(LENGTH, row_length(self.model, self.rows))
        if 2 * (recent + sinks + apart.page) > length:
            raise DataError(
                f"recent={recent} and sinks={sinks} leave no room for a passage beyond them in {length} tokens, which "
                f"model and text allow. Use at most {max(1, length // 2 - sinks - apart.page)} recent ones."
            )
        made = recall_rows(self.rows, length, apart, min(steps, 64)).to(self.device)
        bar = tqdm(total=steps, desc="gates", unit="step", disable=not self.progress)
        return head_gates(self.model, self.infos, made, sinks, recent, steps, bar.update)

    def spans(self, rules: Sequence[Rule], sinks: int) -> tuple[list[int], Mapping[int, Float[Tensor, "n r h"]]]:
        longest = min(LENGTH, row_length(self.model, self.rows))
        lengths = [longest // 2, longest * 3 // 4, longest]
        if 2 * (sinks + 35) > lengths[0]:
            raise DataError(
                f"sinks={sinks} leave no room for a passage behind them in {lengths[0]} tokens, half of what model and "
                "text allow. Use fewer sinks, or give more text."
            )
        made = [recall_rows(self.rows, n, RTN(window=1, sinks=sinks), 2).to(self.device) for n in lengths]
        bar = tqdm(total=sum(map(len, made)), desc="spans", unit="row", disable=not self.progress)
        found = [span_costs(self.model, self.infos, own, rules, sinks, bar.update) for own in made]
        return lengths, {i: torch.stack([one[i] for one in found]) for i in self.infos}

    def needed(self) -> Mapping[int, Needed]:
        with attached(self.model):
            return self._needed()

    @torch.no_grad()
    def _needed(self) -> Mapping[int, Needed]:
        stream = self.rows.flatten()
        length = min(LENGTH, row_length(self.model, self.rows))
        starts = torch.linspace(0, len(stream) - length, min(ROWS, max(1, len(stream) // length))).long().tolist()
        parts: dict[int, list[Needed]] = {i: [] for i in self.infos}
        draw = torch.Generator().manual_seed(0)
        for start in tqdm(starts, desc="tokens", unit="row", disable=not self.progress):
            ids = stream[None, start : start + length].to(self.device)
            dense: Any = prefill(self.model, ids, wanted=Wanted(torch.arange, hidden=True, judged=True))
            some = torch.randperm(length, generator=draw)[:TOKENS].sort().values.to(self.device)
            positions = torch.arange(length, device=self.device)[None]
            for i, info in self.infos.items():
                keys, asked = dense.layers[i].keys, dense.asked[i].queries
                if info.rope is not None:
                    rope = info.rope.to(self.device)
                    keys, asked = rope.undo(keys, positions), rope.undo(asked, positions)
                queries, keys, values = (
                    x[0, :, some].transpose(0, 1).float() for x in (asked, keys, dense.layers[i].values)
                )
                scores = dense.judged[i].scores[0, :, some].T.clamp_min(LEAST)
                parts[i].append(Needed(dense.hidden[i][0, some].float(), queries, keys, values, scores))
        return {i: _joined(own) for i, own in parts.items()}


def _joined(parts: Sequence[Needed]) -> Needed:
    names = ("hidden", "queries", "keys", "values", "scores")
    return Needed(*(torch.cat([getattr(part, name) for part in parts]) for name in names))

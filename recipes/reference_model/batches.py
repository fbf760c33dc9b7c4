"""Documents to training rows: token ids, loss weights and positions.

Loss falls on every token, but answers weigh most, and a row is packed with documents full of questions: retrieval gets
a dense signal. In rows shorter than the context, positions are stretched by random gaps up to the full context
("PoSE", arXiv 2309.10400), so that heads see long distances before they see long rows. Packed documents can attend to
each other; a mask per document would cost the fast causal attention.
"""

import random
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerFast

from recipes.reference_model import tasks
from recipes.reference_model.tasks.world import ANSWER, RECORD, Example, World

STRETCHED = 0.5  # share of the rows with gaps in their positions
REPEATED = 0.15  # share of the bootstrap's rows that are repeated random tokens
END_WEIGHT = 0.1

Row = tuple[Int[Tensor, " t1"], Float[Tensor, " t1"], Int[Tensor, " t"]]


class Encoder:
    """Examples to ids, loss weights and answer numbers (0: no answer, n: the n-th answer of the document)."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.raw = tokenizer.backend_tokenizer
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id

    def __call__(self, ex: Example, close: bool = True) -> tuple[list[int], list[float], list[int]]:
        """With `close`, the document ends in the end token; a document to be measured does not."""
        ids, weights, numbers = [self.bos], [0.0], [0]
        answers = 0
        coded = self.raw.encode_batch_fast([text for text, _ in ex.segments], add_special_tokens=False)
        for (_, weight), piece in zip(ex.segments, coded, strict=True):
            size = len(piece.ids)
            ids += piece.ids
            if weight >= ANSWER and size:
                answers += 1
                # the first token of an answer is the retrieval proper, the others mostly follow from it
                weights += [2 * weight] + [0.75 * weight] * (size - 1)
                numbers += [answers] * size
            else:
                weights += [weight] * size
                numbers += [0] * size
        if close:
            ids.append(self.eos)
            weights.append(END_WEIGHT)
            numbers.append(0)
        return ids, weights, numbers


class Documents(IterableDataset):
    """Endless rows of packed documents: ids [t + 1], weights [t + 1], positions [t]."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, world: World, length: int, progress: float, context: int):
        self.encode, self.world = Encoder(tokenizer), world
        self.length, self.progress, self.context, self.vocab = length, progress, context, len(tokenizer)

    def __iter__(self) -> Iterator[Row]:
        worker = get_worker_info()
        if worker is not None:
            self.world.rng.seed(worker.seed)
        while True:
            ids, weights = self._row()
            yield torch.tensor(ids), torch.tensor(weights), self._positions()

    def _row(self) -> tuple[list[int], list[float]]:
        rng, need = self.world.rng, self.length + 1
        if self.progress < tasks.BOOT_END and rng.random() < REPEATED:
            return repeats(rng, need, self.vocab)
        ids: list[int] = []
        weights: list[float] = []
        while len(ids) < need:
            left = need - len(ids)
            if left < 70:
                ex = tasks.book(self.world, left)
            else:
                size = left if left < 200 or rng.random() < 0.7 else int(left * rng.uniform(0.3, 0.8))
                ex = tasks.sample(self.world, int(size * 0.96) - 4, self.progress)
            more_ids, more_weights, _ = self.encode(ex)
            ids += more_ids
            weights += more_weights
        return ids[:need], weights[:need]

    def _positions(self) -> Int[Tensor, " t"]:
        rng, positions = self.world.rng, torch.arange(self.length)
        spare = self.context - self.length
        # the shortest rows are where induction forms: distances stay true there
        share = STRETCHED if self.length > 128 else 0.0
        if spare > 0 and rng.random() < share:
            cuts = sorted(rng.sample(range(1, self.length), rng.randint(1, 4)))
            extra = rng.randint(0, spare)
            gaps = sorted(rng.randint(0, extra) for _ in cuts)
            for cut, gap, before in zip(cuts, gaps, [0, *gaps[:-1]], strict=True):
                positions[cut:] += gap - before
        return positions


def repeats(rng: random.Random, need: int, vocab: int) -> tuple[list[int], list[float]]:
    """Random tokens, repeated with a random period: the purest signal for induction."""
    period = rng.randint(6, (need - 1) // 2)
    body = [rng.randrange(3, vocab) for _ in range(period)]
    return (body * (need // period + 1))[:need], [RECORD] * period + [1.0] * (need - period)

"""Samples to what is asked of one cache: contexts, and rounds of questions about them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import torch
from torch import Tensor

from kvshrink.errors import SettingError
from kvshrink.eval.run.prompt import encode, encode_turns
from kvshrink.eval.tasks import Sample

AGNOSTIC, AWARE, MULTI_TURN = MODES = ("agnostic", "aware", "multi_turn")

Case = tuple[int, Sample]  # a sample and its place in the task


@dataclass(frozen=True)
class Group:
    """Contexts that are compressed together, a row each, and rounds of one question a row.

    rounds: the cases of each round, a row each; questions: their token ids.
    feeds:  token ids that the cache is given after a round (multi_turn: question and reference answer), else empty.
    """

    contexts: list[list[int]]
    rounds: list[list[Case]]
    questions: list[list[list[int]]]
    feeds: list[list[int]]

    @property
    def cases(self) -> list[Case]:
        return [case for cases in self.rounds for case in cases]

    def reads(self) -> dict[int, list[list[int]]]:
        """Per case the token ids that its answer depends on: context, what was fed before, question."""
        found = {}
        for n, (cases, questions) in enumerate(zip(self.rounds, self.questions, strict=True)):
            for row, ((i, _), question) in enumerate(zip(cases, questions, strict=True)):
                found[i] = [self.contexts[row], *self.feeds[:n], question]
        return found

    def tokens(self) -> int:
        """The most tokens that a cache of this group sees, answers included."""
        sizes = {i: sum(map(len, parts)) for i, parts in self.reads().items()}
        return max(sizes[i] + sample.max_new_tokens for i, sample in self.cases)


def groups(samples: Sequence[Sample], mode: str, tokenizer, batch: int) -> Iterator[Group]:
    """The samples of a task as groups. Rows are batched only where each context has one question.

    Raises SettingError for a mode that is not known, or multi_turn for contexts with one question each.
    """
    if mode not in MODES:
        raise SettingError(f"mode {mode!r} is not known. Use one of {', '.join(MODES)}.")
    cases = list(enumerate(samples))
    by_context = [list(g) for _, g in groupby(cases, key=lambda case: case[1].context)]
    single = all(len(g) == 1 for g in by_context)
    if mode == MULTI_TURN and single:
        raise SettingError("multi_turn needs several questions about a context, as scbench_like has. Use agnostic.")
    if mode == AWARE or single:
        for at in range(0, len(cases), batch):
            yield _rows(cases[at : at + batch], mode, tokenizer)
    else:
        for shared in by_context:
            yield _shared(shared, mode, tokenizer)


def shares_contexts(samples: Sequence[Sample]) -> bool:
    """Whether some context has several questions."""
    return any(a.context == b.context for a, b in pairwise(samples))


def _rows(cases: list[Case], mode: str, tokenizer) -> Group:
    contexts, questions = [], []
    for _, sample in cases:
        context, question = encode(sample, tokenizer)
        if mode == AWARE:  # the question is in view, only its last token is left to feed
            context, question = context + question[:-1], question[-1:]
        contexts.append(context)
        questions.append(question)
    return Group(contexts, [cases], [questions], [])


def _shared(cases: list[Case], mode: str, tokenizer) -> Group:
    samples = [sample for _, sample in cases]
    if mode == MULTI_TURN:
        context, turns = encode_turns(samples, tokenizer)
        questions, feeds = [q for q, _ in turns], [q + a for q, a in turns]
    else:
        encoded = [encode(sample, tokenizer) for sample in samples]
        context, questions, feeds = encoded[0][0], [q for _, q in encoded], []
    return Group([context], [[case] for case in cases], [[q] for q in questions], feeds)


def left_pad(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(token ids, mask) [b, t] of rows of any length; the mask is 0 at the pads in front."""
    width = max(map(len, rows))
    ids = [[pad] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)

"""The training loop: one step, when to measure, when to save, when to stop.

Only training time is charged to a budget of minutes, so measuring more often does not train less. A run that stops
before its budget is spent leaves a checkpoint, from which the next call goes on.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from recipes.reference_model.checkpoint import Interrupt, State
from recipes.reference_model.corpus import Corpus
from recipes.reference_model.feed import Feed
from recipes.reference_model.journal import Journal
from recipes.reference_model.measure import book_loss, glance
from recipes.reference_model.model import build, for_training, hidden_states, weighted_loss
from recipes.reference_model.optim import optimizers, set_rate
from recipes.reference_model.recipe import Recipe
from recipes.reference_model.schedule import Budget, rate

LARGEST_GRADIENT = 1.0


@dataclass(frozen=True)
class Machine:
    """Where and how a run computes, and how often it saves. Nothing here changes what is learnt."""

    device: str = "cpu"
    workers: int = 0
    compiled: bool = True
    eval_minutes: float = 3.0
    save_minutes: float = 2.0
    stop_after: int | None = None  # steps of this call


def train(
    recipe: Recipe, corpus: Corpus, tokenizer: PreTrainedTokenizerFast, folder: Path, budget: Budget, machine: Machine
) -> float:
    """Train until the budget is spent or a stop is asked for, leaving a checkpoint; return the progress reached."""
    state = start(recipe, tokenizer, folder, machine.device)
    for_training(state.model, machine.compiled)
    loss_of = torch.compile(weighted_loss, dynamic=False) if machine.compiled else weighted_loss
    seed = recipe.seed + state.step
    feed = Feed(recipe, corpus, tokenizer, seed=seed, workers=machine.workers, device=machine.device)
    last = math.inf if machine.stop_after is None else state.step + machine.stop_after
    saved = measured = time.monotonic()
    progress = budget.progress(state.tokens, state.seconds)
    with Interrupt() as interrupt, Journal(folder, progress) as journal:
        while progress < 1 and state.step < last and not interrupt.asked:
            began = time.monotonic()
            ids, weights, positions = feed.batch(progress)
            lr = set_rate(state.optimizers, rate(state.step, progress))
            loss = descend(state, loss_of, ids, weights, positions)
            state.step += 1
            state.tokens += positions.numel()
            state.seconds += time.monotonic() - began
            progress = budget.progress(state.tokens, state.seconds)
            length = positions.shape[1]
            journal.step(state, loss, tokens=positions.numel(), length=length, lr=lr, progress=progress)
            if time.monotonic() - measured > 60 * machine.eval_minutes:
                journal.note(**_measured(state, corpus, tokenizer, length), progress=round(progress, 4))
                journal.start_clock()
                measured = time.monotonic()
            if time.monotonic() - saved > 60 * machine.save_minutes:
                state.save(folder)
                saved = time.monotonic()
        state.save(folder)
    return progress


def start(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, folder: Path, device: str) -> State:
    """A new model, or the one of the folder's checkpoint."""
    torch.manual_seed(recipe.seed)
    model = build(recipe, tokenizer).to(device)
    state = State(model, optimizers(model, recipe.lr))
    if state.load(folder, device):
        # workers draw their seeds from torch's: not the documents that were seen already
        torch.manual_seed(recipe.seed + state.step)
    return state


def descend(state: State, loss_of, ids: Tensor, weights: Tensor, positions: Tensor) -> Tensor:
    """One step of both optimizers; returns the loss before it."""
    h = hidden_states(state.model, ids[:, :-1], positions)
    head = state.model.lm_head.weight
    loss = loss_of(h.flatten(0, 1), head, ids[:, 1:].flatten(), weights[:, 1:].flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(state.model.parameters(), LARGEST_GRADIENT)
    for optimizer in state.optimizers:
        optimizer.step()
    state.model.zero_grad(set_to_none=True)
    return loss.detach()


def _measured(state: State, corpus: Corpus, tokenizer: PreTrainedTokenizerFast, length: int) -> dict:
    right = glance(state.model, tokenizer, corpus, length, cases=max(3, 2048 // length))
    texts = list(corpus.held_out.values())
    book = book_loss(state.model, tokenizer, texts, length, windows=max(3, 4096 // length))
    return {"tokens": state.tokens, "length": length, "book_perplexity": round(math.exp(book), 2), "right": right}

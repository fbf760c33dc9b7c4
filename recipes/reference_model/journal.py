"""What a run says while it trains: a progress bar for people, log.jsonl for later.

Losses stay on the device until they are averaged: reading one makes the host wait for a GPU.
"""

import json
import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from recipes.reference_model.checkpoint import State

EVERY = 20  # steps


class Journal:
    def __init__(self, folder: Path, progress: float):
        self.log = (folder / "log.jsonl").open("a")
        self.bar = tqdm(total=1.0, desc="train", bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}")
        self.bar.n = progress
        self.losses: list[Tensor] = []
        self.tokens, self.since = 0, time.monotonic()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()
        self.log.close()

    def note(self, **facts) -> None:
        self.log.write(json.dumps(facts) + "\n")
        self.log.flush()

    def step(self, state: State, loss: Tensor, *, tokens: int, length: int, lr: float, progress: float) -> None:
        self.losses.append(loss)
        self.tokens += tokens
        self.bar.n = progress
        if state.step % EVERY:
            return
        facts = {
            "step": state.step,
            "progress": round(progress, 4),
            "tokens": state.tokens,
            "length": length,
            "loss": round(torch.stack(self.losses).mean().item(), 4),
            "lr": round(lr, 6),
            "tokens_per_second": round(self.tokens / (time.monotonic() - self.since)),
            "minutes": round(state.seconds / 60, 2),
        }
        self.note(**facts)
        self.bar.set_postfix({k: facts[k] for k in ("length", "loss", "tokens_per_second")})
        self.losses.clear()
        self.start_clock()

    def start_clock(self) -> None:
        """Count tokens per second from here: measuring is not training."""
        self.tokens, self.since = 0, time.monotonic()

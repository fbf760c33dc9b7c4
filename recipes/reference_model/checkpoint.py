"""Saving a run so that an interrupt loses little, and going on from there.

A checkpoint holds tensors and numbers only, so `torch.load(..., weights_only=True)` reads it. It is written beside
the old one and moved over it: a run killed while saving keeps the old one. What is not saved is the place in the stream
of documents, so a resumed run sees other documents than an uninterrupted one would have seen.
"""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

NAME = "checkpoint.pt"


@dataclass
class State:
    """All that training changes. `seconds` is training time, summed over interrupts."""

    model: LlamaForCausalLM
    optimizers: list[torch.optim.Optimizer]
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def save(self, folder: Path) -> None:
        content = {
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
        }
        write_atomically(folder / NAME, lambda part: torch.save(content, part))

    def load(self, folder: Path, device: str) -> bool:
        """Go on from the folder's checkpoint; False if there is none."""
        content = read(folder, device)
        if content is None:
            return False
        self.model.load_state_dict(content["model"])
        for optimizer, saved in zip(self.optimizers, content["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.tokens, self.seconds = content["step"], content["tokens"], content["seconds"]
        return True


def read(folder: Path, device: str = "cpu") -> dict | None:
    path = folder / NAME
    return torch.load(path, map_location=device, weights_only=True) if path.exists() else None


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, then move it into place."""
    part = path.with_name(path.name + ".part")
    write(part)
    os.replace(part, path)


class Interrupt:
    """Ctrl-C or SIGTERM sets a flag, so that the step in progress ends whole; a second one stops at once."""

    def __init__(self):
        self.asked = False

    def __enter__(self) -> "Interrupt":
        self.before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _) -> None:
        self.asked = True
        signal.signal(number, self.before[number])

"""Random episodes: steps with all kinds of masks and positions, and operations on the batch, through a lossless cache
of ours and through DynamicCache. Each step's logits are equal, or ours was refused in one line and is as it was.

`python -m tests.fuzz.episodes --cases 5000` runs many and prints one JSON object; `--first N --cases 1` runs one again.
"""

import argparse
import copy
import json
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

import kvshrink
from kvshrink import CSKV, RTN
from kvshrink.errors import KVShrinkError
from kvshrink.methods._roles import Method
from tests.fuzz import Tally, masks
from tests.scenarios.families import VOCAB, reference, subject

FAMILIES = ("llama", "gemma2", "qwen2_mixed", "glm4", "smollm3")
LONGEST = 150  # tokens of an episode
TOLERANCE = 1e-4  # of logits, whose largest is some 10


class Finding(AssertionError):
    """What must not be: another result than DynamicCache's, or an error that is not ours."""


@cache
def fitted(family: str, page: int) -> kvshrink.Artifact:
    """All channels of every key and value, rotated: lossless, and keys are stored before RoPE."""
    rows = torch.randint(2, VOCAB, (8, 64), generator=torch.Generator().manual_seed(0))
    return kvshrink.fit(subject(family), CSKV(keep=1.0, window=8), rows, progress=False)


def method_of(family: str, rng: np.random.Generator):
    if rng.random() < 0.3:
        return fitted(family, Method.page)
    return RTN(bits=None, window=int(rng.choice([1, 5, 8, 32])), sinks=int(rng.choice([0, 1, 4, 12])))


class Episode:
    """One pair of caches and what a mask must know of them: which columns are pads."""

    def __init__(self, number: int, seed: int, folder: Path, tally: Tally) -> None:
        self.rng, self.folder, self.done = np.random.default_rng([seed, number]), folder, tally.within
        self.family = FAMILIES[number % len(FAMILIES)]
        self.theirs, self.ours = reference(self.family), subject(self.family)
        self.rows = int(self.rng.integers(1, 4))
        self.method = method_of(self.family, self.rng)
        self.empty()

    def empty(self) -> None:
        self.full = DynamicCache(config=self.theirs.config)
        self.cache = kvshrink.make_cache(self.ours, self.method)
        self.pads = np.zeros((self.rows, 0), bool)
        self.next = np.zeros(self.rows, int)  # position of each row's next token
        self.forks: list = []

    @property
    def seen(self) -> int:
        return self.pads.shape[1]

    def run(self) -> None:
        for _ in range(int(self.rng.integers(3, 12))):
            if self.seen and self.rng.random() < 0.3:
                self.operate()
            elif self.seen < LONGEST:
                self.step()
        for left in self.forks:  # what was left behind is as it was
            self.cache, self.full, self.pads = left
            self.rows = len(self.pads)
            self.compare(torch.full((self.rows, 1), 7), None if not self.pads.any() else self.plain(1), None)

    # --- steps ---

    def plain(self, s: int) -> Tensor:
        return torch.from_numpy(np.concatenate([~self.pads, np.ones((self.rows, s), bool)], 1)).long()

    def step(self) -> None:
        s = int(self.rng.choice([1, 1, 1, 2, 5, 17, 40, 70]))
        drawn = masks.draw(self.rng, self.pads, s, self.theirs.config.num_attention_heads)
        positions, ended = masks.positions(self.rng, self.next, drawn.real)
        ids = torch.from_numpy(self.rng.integers(2, VOCAB, (self.rows, s)))
        self.done[f"mask {drawn.kind}"] += 1
        if self.compare(ids, drawn.mask, positions, drawn.read):
            self.pads = np.concatenate([self.pads, ~drawn.real], 1)
            self.next = ended

    def compare(self, ids: Tensor, mask: Tensor | None, positions: Tensor | None, read=None) -> bool:
        """Whether the step was taken. `read`: the new tokens whose logits mean something [b, s]."""
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        try:
            got = self.forward(self.ours, self.cache, given)
        except KVShrinkError as error:
            self.refused(error)
            return False
        try:
            wanted = self.forward(self.theirs, self.full, given)
        except Exception as error:
            raise Finding(f"DynamicCache refuses what we take: {type(error).__name__}: {error}") from error
        read = np.ones(ids.shape, bool) if read is None else read
        # eager attention makes NaN of a query to which -inf hides everything, and then of all that meets its keys
        read = read & wanted.isfinite().all(-1).numpy()
        worst = float((got - wanted)[torch.from_numpy(read)].abs().max()) if read.any() else 0.0
        if not worst <= TOLERANCE * max(1.0, float(wanted.abs().nan_to_num().max())):
            raise Finding(f"logits differ by {worst:.3g} after {self.seen} tokens")
        self.done["steps compared"] += 1
        return True

    @staticmethod
    @torch.no_grad()
    def forward(model, cache, given: dict) -> Tensor:
        return model(**{k: x for k, x in given.items() if x is not None}, past_key_values=cache).logits

    def refused(self, error: KVShrinkError) -> None:
        if "\n" in str(error):
            raise Finding(f"a message of several lines: {error}") from error
        if "interrupted" in str(error) or self.cache.get_seq_length() != self.seen:
            raise Finding(f"a refusal that changed the cache: {error}") from error
        self.done["refused"] += 1

    # --- operations ---

    def operate(self) -> None:
        name = str(self.rng.choice(["reorder", "select", "repeat", "crop", "crop", "fork", "reload", "reset"]))
        try:
            getattr(self, name)()
            self.done[name] += 1
        except KVShrinkError as error:
            self.refused(error)

    def reorder(self) -> None:
        index = torch.from_numpy(self.rng.integers(0, self.rows + (self.rng.random() < 0.1), self.rows))
        self.cache.reorder_cache(index)
        self.full.reorder_cache(index)
        self.keep(index.numpy())

    def select(self) -> None:
        index = torch.from_numpy(self.rng.integers(-self.rows, self.rows, int(self.rng.integers(1, 4))))
        if self.rng.random() < 0.2:
            index = index[:0] if self.rng.random() < 0.5 else index[None]  # none, or of two axes: refused
        elif self.rng.random() < 0.2:
            index = torch.from_numpy(np.arange(self.rows) == self.rng.integers(self.rows))
        self.cache.batch_select_indices(index)
        self.full.batch_select_indices(index)
        self.keep(index.numpy())

    def repeat(self) -> None:
        count = int(self.rng.choice([0, 1, 2]) if self.rows < 3 else 1)
        self.cache.batch_repeat_interleave(count)
        self.full.batch_repeat_interleave(count)
        self.keep(np.repeat(np.arange(self.rows), count))

    def keep(self, index: np.ndarray) -> None:
        self.pads, self.next = self.pads[index], self.next[index]
        self.rows = len(self.pads)

    def crop(self) -> None:
        count = int(self.rng.integers(0, self.seen + 3))
        self.cache.crop(-count)
        if count == self.seen:  # a sliding layer of transformers cannot, when its window has moved on
            self.full = DynamicCache(config=self.theirs.config)
            self.rows = int(self.rng.integers(1, 4))
            self.pads, self.next = np.zeros((self.rows, 0), bool), np.zeros(self.rows, int)
        elif count:
            self.full.crop(-count)
            self.pads = self.pads[:, : self.seen - count]

    def fork(self) -> None:
        self.forks = [(self.cache, self.full, self.pads)]
        self.cache, self.full = copy.deepcopy(self.cache), copy.deepcopy(self.full)

    def reload(self) -> None:
        path = self.folder / "cache.safetensors"
        self.cache.save(path, deflate=bool(self.rng.random() < 0.3))
        self.cache = kvshrink.make_cache(self.ours, self.method).load(path)

    def reset(self) -> None:
        self.cache.reset()
        self.crop_full()

    def crop_full(self) -> None:
        self.full = DynamicCache(config=self.theirs.config)
        self.rows = int(self.rng.integers(1, 4))
        self.pads, self.next = np.zeros((self.rows, 0), bool), np.zeros(self.rows, int)


def run(cases: range, seed: int, folder: Path) -> Tally:
    """Episodes of these numbers."""
    tally = Tally("episodes", seed)
    page = Method.page
    try:
        for number in cases:
            # the compiled kernel reads pages of 32; small ones cross more borders
            Method.page = 32 if number % 3 else 8
            episode = Episode(number, seed, folder, tally)
            try:
                # every fifth one materialises keys and values for the model's own attention
                own = number // len(FAMILIES) % 5 > 0 or episode.family == "gemma2"
                episode.ours.set_attn_implementation("kvshrink" if own else "sdpa")
                episode.run()
            except Exception as error:
                tally.find(number, f"{type(error).__name__}: {error}", model=episode.family)
            else:
                tally.add("alike")
            finally:
                episode.ours.set_attn_implementation("kvshrink")
    finally:
        Method.page = page
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)  # of tiny models a second thread only waits
    with tempfile.TemporaryDirectory() as folder:
        tally = run(range(given.first, given.first + given.cases), given.seed, Path(folder))
    print(json.dumps(tally.summary(), indent=1))
    if given.out:
        tally.write(given.out)


if __name__ == "__main__":
    main()

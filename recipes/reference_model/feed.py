"""Batches for the training loop, from a loader that is renewed as training goes on.

The kinds of documents and the length of the rows depend on progress, and worker processes cannot be told that progress
has changed. So the loader is made anew with every stage and every twentieth of progress.
"""

import os
import random

from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from recipes.reference_model.batches import Documents
from recipes.reference_model.corpus import Corpus
from recipes.reference_model.recipe import Recipe
from recipes.reference_model.schedule import stage_at


class Feed:
    def __init__(
        self,
        recipe: Recipe,
        corpus: Corpus,
        tokenizer: PreTrainedTokenizerFast,
        *,
        seed: int,
        workers: int,
        device: str,
    ):
        self.recipe, self.tokenizer, self.workers, self.device = recipe, tokenizer, workers, device
        self.world = corpus.training_world(random.Random(seed))
        self.key = None
        if workers:
            # the tokenizer's threads do not survive the fork, and it would say so in every worker
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    def batch(self, progress: float) -> tuple[Tensor, Tensor, Tensor]:
        """ids [b, t + 1], weights [b, t + 1], positions [b, t], on the device."""
        stage = stage_at(progress, self.recipe.context)
        key = (stage.length, int(progress * 20))
        if key != self.key:
            self.key = key
            rows = max(1, int(self.recipe.batch_tokens * stage.share) // stage.length)
            documents = Documents(self.tokenizer, self.world, stage.length, progress, self.recipe.context)
            self.loader = iter(
                DataLoader(documents, rows, num_workers=self.workers, pin_memory=self.device.startswith("cuda"))
            )
        ids, weights, positions = (t.to(self.device, non_blocking=True) for t in next(self.loader))
        return ids, weights, positions

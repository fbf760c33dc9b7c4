"""Byte-level BPE in which every digit is a token and underscores count as letters.

A number that is copied digit by digit cannot be guessed from a merge, and `REGISTER_CONTENT` stays one word. Generated
documents are part of the training text, so that their wordings cost few tokens of the context.
"""

import random

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from recipes.reference_model import tasks
from recipes.reference_model.corpus import Corpus
from recipes.reference_model.recipe import Recipe

SPECIAL = ("<|bos|>", "<|eos|>", "<|pad|>")
SPLIT = r"\p{N}| ?[\p{L}_]+| ?[^\s\p{L}\p{N}_]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
DOCUMENTS = 1500


def train_tokenizer(corpus: Corpus, recipe: Recipe) -> tuple[PreTrainedTokenizerFast, float]:
    """The tokenizer, and the characters per token that it reaches on the training books."""
    world = corpus.training_world(random.Random(0))
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    generated = [tasks.sample(world, 512, p / DOCUMENTS).text for p in range(DOCUMENTS)]
    excerpts = [text[i : i + 20000] for text in corpus.train.values() for i in range(0, len(text), 40000)]
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(excerpts + generated, trainer)
    probe = world.passage(200_000)
    bos, eos, pad = SPECIAL
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token=bos, eos_token=eos, pad_token=pad, model_max_length=recipe.context
    )
    return tokenizer, len(probe) / len(raw.encode(probe).ids)

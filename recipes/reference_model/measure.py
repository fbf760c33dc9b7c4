"""Is an answer right, and how well is a book predicted: the two measures behind every number of this recipe.

Answers are measured with the right text before them: "every token is the arg-max" and "greedy decoding gives the
answer" are then the same, and a document with twenty questions costs one forward pass.
"""

import math
import random

import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from recipes.reference_model import tasks
from recipes.reference_model.batches import Encoder
from recipes.reference_model.corpus import Corpus
from recipes.reference_model.model import hidden_states
from recipes.reference_model.tasks.world import Example

GLANCED = ("assoc", "lines", "needles", "haystack", "jsonkv", "variables")


@torch.no_grad()
def answers_right(model: LlamaForCausalLM, encoder: Encoder, ex: Example) -> list[bool]:
    """Per answer of the document: would greedy decoding give it exactly?"""
    ids, _, numbers = encoder(ex, close=False)
    x = torch.tensor([ids], device=model.device)
    size = padded_size(len(ids) - 1)
    h = hidden_states(model, F.pad(x[:, :-1], (0, size - len(ids) + 1)), torch.arange(size, device=model.device)[None])
    number = torch.tensor(numbers[1:], device=model.device)
    at = number.nonzero()[:, 0]
    right = F.linear(h[0, at].float(), model.lm_head.weight.float()).argmax(-1) == x[0, 1:][at]
    return [bool(right[number[at] == k].all()) for k in range(1, int(number.max()) + 1)]


def padded_size(tokens: int) -> int:
    """Few sizes mean few compilations; a document slightly longer than a power of two is common."""
    size = 128
    while size + size // 32 < tokens:
        size *= 2
    return size if tokens <= size else size + size // 32


@torch.no_grad()
def book_loss(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str], length: int, windows: int
) -> float:
    """Mean cross-entropy per token (nats) on evenly spaced windows of `length` tokens."""
    losses = []
    for k in range(windows):
        text = texts[k % len(texts)]
        spare = max(0, len(text) - 6 * length)
        at = int((k // len(texts) + 0.5) / math.ceil(windows / len(texts)) * spare)
        ids = tokenizer.backend_tokenizer.encode(text[at : at + 6 * length], add_special_tokens=False).ids[:length]
        x = torch.tensor([[tokenizer.bos_token_id, *ids]], device=model.device)
        h = hidden_states(model, x[:, :-1], torch.arange(len(ids), device=model.device)[None])
        losses.append(F.cross_entropy(F.linear(h[0].float(), model.lm_head.weight.float()), x[0, 1:]).item())
    return sum(losses) / len(losses)


def glance(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, corpus: Corpus, length: int, cases: int
) -> dict[str, float]:
    """Share of answers right in training-style documents of held-out words and books, by task."""
    encoder, world = Encoder(tokenizer), corpus.held_out_world(random.Random(1234))
    result = {}
    for task in GLANCED:
        documents = [tasks.TASKS[task](world, int(length * 0.96)) for _ in range(cases)]
        right = [r for ex in documents for r in answers_right(model, encoder, ex)]
        result[task] = round(sum(right) / len(right), 3)
    return result

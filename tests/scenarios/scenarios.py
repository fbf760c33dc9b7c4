"""What users do with a cache. Each scenario takes a model and `make`, which gives an empty cache, and returns tokens.

Every prompt is long enough for pages to leave the window before the first new token, and enough tokens are generated
for another page to leave while decoding. Nothing here knows which cache it drives, save where a feature is ours alone.
"""

import copy
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from kvshrink import KVCache
from tests.scenarios.families import VOCAB, assistant

PAD = 0
PROMPT = 100  # two pages of 32 leave a window of 8; the third leaves 9 tokens later
NEW = 12

Make = Callable[[], Cache]
Scenario = Callable[[PreTrainedModel, Make], list[Tensor]]


def greedy(model: PreTrainedModel, make: Make) -> list[Tensor]:
    return [generate(model, tokens(2, PROMPT), make(), max_new_tokens=44)]


def sampling(model: PreTrainedModel, make: Make) -> list[Tensor]:
    torch.manual_seed(5)
    return [generate(model, tokens(1, PROMPT), make(), do_sample=True, num_return_sequences=3)]


def left_padded(model: PreTrainedModel, make: Make) -> list[Tensor]:
    """One row without pads, one that loses a page to them, one with fewer tokens than the sinks and the window."""
    ids, mask = padded_tokens(0, 37, PROMPT - 3)
    return [generate(model, ids, make(), attention_mask=mask)]


def beams(model: PreTrainedModel, make: Make) -> list[Tensor]:
    ids, mask = padded_tokens(0, 37)
    return [generate(model, ids, make(), attention_mask=mask, num_beams=3, num_return_sequences=2)]


def chunks_of_7(model: PreTrainedModel, make: Make) -> list[Tensor]:
    """By hand and without a mask, so that the mask is None for the first chunk only."""
    ids, cache = tokens(2, PROMPT), make()
    feed(model, ids[:, :-1], cache, 7)
    return [generate(model, ids, cache)]


def chunks_of_50(model: PreTrainedModel, make: Make) -> list[Tensor]:
    return [generate(model, tokens(1, 2 * PROMPT), make(), prefill_chunk_size=50)]


def left_padded_chunks(model: PreTrainedModel, make: Make) -> list[Tensor]:
    """The first chunks are pads only in one row, and cut a page's pads from its tokens in another."""
    ids, mask = padded_tokens(0, 37, 70)
    cache = make()
    feed(model, ids[:, :-1], cache, 19, mask)
    return [generate(model, ids, cache, attention_mask=mask)]


def prompt_lookup(model: PreTrainedModel, make: Make) -> list[Tensor]:
    """The first draft of 12 is wrong and leaves a window of 8, so that taking it back cuts a page."""
    ids = tokens(1, 24).repeat(1, 4)
    return [generate(model, ids, make(), prompt_lookup_num_tokens=12, max_new_tokens=20)]


def assisted(model: PreTrainedModel, make: Make) -> list[Tensor]:
    helper = assistant(model.name_or_path)
    return [generate(model, tokens(1, PROMPT), make(), assistant_model=helper, max_new_tokens=20)]


def rewinds(model: PreTrainedModel, make: Make) -> list[Tensor]:
    """Back over the window, a page and a sink, then forward on other tokens; and once more, less far."""
    ids, mask = padded_tokens(0, 37)
    cache = make()
    cache.activate_past_recording()  # else sliding layers refuse
    feed(model, ids, cache, mask=mask)
    for keep in (39, 55):
        cache.crop(keep - PROMPT)
        ids = torch.cat([ids[:, :keep], tokens(2, PROMPT - keep, seed=keep)], 1)
        feed(model, ids, cache, mask=mask)
    cache.crop(-1)
    return [generate(model, ids, cache, attention_mask=mask)]


def turns_with_full_ids(model: PreTrainedModel, make: Make) -> list[Tensor]:
    cache, ids, out = make(), tokens(2, PROMPT), []
    for turn in range(3):
        ids = generate(model, ids, cache, max_new_tokens=5)
        out.append(ids)
        ids = torch.cat([ids, tokens(2, 20 + turn, seed=turn)], 1)
    return out


def turns_with_new_ids(model: PreTrainedModel, make: Make) -> list[Tensor]:
    """New ids alone, under a mask of full length; the last token of a turn is not in the cache yet."""
    new, mask = padded_tokens(0, 37)
    cache, out = make(), []
    for turn in range(3):
        reply = generate(model, new, cache, attention_mask=mask, max_new_tokens=5)
        out.append(reply)
        new = torch.cat([reply[:, -1:], tokens(2, 20 + turn, seed=turn)], 1)
        mask = torch.cat([mask, mask.new_ones(2, cache.get_seq_length() + new.shape[1] - mask.shape[1])], 1)
    return out


def turns_with_inner_pads(model: PreTrainedModel, make: Make) -> list[Tensor]:
    """A batch of chats whose turns differ in length: later turns have pads between what is cached and what is new."""
    new, mask = padded_tokens(0, 37)
    cache, out = make(), []
    for turn in range(3):
        reply = generate(model, new, cache, attention_mask=mask, max_new_tokens=5)
        out.append(reply)
        inner = torch.ones(2, 40, dtype=torch.long)
        inner[turn % 2, : 33 - turn] = 0
        new = torch.cat([reply[:, -1:], tokens(2, 40, seed=turn).where(inner > 0, PAD)], 1)
        mask = torch.cat([mask, mask.new_ones(2, 5), inner], 1)
    return out


def forks(model: PreTrainedModel, make: Make) -> list[Tensor]:
    """One prefix, two continuations, the last on the cache that was copied."""
    prefix, cache = tokens(1, PROMPT), make()
    feed(model, prefix, cache)
    return [
        generate(model, torch.cat([prefix, tokens(1, 9 + i, seed=i)], 1), fork, max_new_tokens=10)
        for i, fork in enumerate([copy.deepcopy(cache), cache])
    ]


def save_and_load(model: PreTrainedModel, make: Make) -> list[Tensor]:
    ids, mask = padded_tokens(0, 37)
    cache = make()
    first = generate(model, ids, cache, attention_mask=mask, max_new_tokens=5)
    if isinstance(cache, KVCache):
        with tempfile.TemporaryDirectory() as folder:
            cache.save(Path(folder) / "cache.safetensors")
            cache = make().load(Path(folder) / "cache.safetensors")
    mask = torch.cat([mask, mask.new_ones(2, 5)], 1)
    return [first, generate(model, first, cache, attention_mask=mask)]


def reset_and_reuse(model: PreTrainedModel, make: Make) -> list[Tensor]:
    """The second run has another batch size, and no pads where the first one had some."""
    ids, mask = padded_tokens(0, 37)
    cache = make()
    first = generate(model, ids, cache, attention_mask=mask, max_new_tokens=4)
    cache.reset()
    return [first, generate(model, tokens(3, PROMPT), cache)]


def two_threads(model: PreTrainedModel, make: Make) -> list[Tensor]:
    """Two caches on one model at once; the rows that have pads are not the same."""
    out: dict[int, Tensor | BaseException] = {}
    barrier = threading.Barrier(2, timeout=60)
    caches = [make(), make()]

    def run(i: int) -> None:
        try:
            ids, mask = padded_tokens(*((0, 37), (60, 0))[i], seed=i)
            barrier.wait()
            out[i] = generate(model, ids, caches[i], attention_mask=mask)
        except BaseException as error:  # raised again below, in the thread that asserts
            out[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in out.values():
        if isinstance(result, BaseException):
            raise result
    return [out[0], out[1]]


def batch_operations(model: PreTrainedModel, make: Make) -> list[Tensor]:
    """Prefill two rows, repeat each twice, drop one of the four, turn the others round, go on."""
    ids, mask = padded_tokens(0, 37)
    cache = make()
    feed(model, ids[:, :-1], cache, mask=mask)
    cache.batch_repeat_interleave(2)
    chosen, order = torch.tensor([3, 0, 1]), torch.tensor([2, 0, 1])
    cache.batch_select_indices(chosen)
    cache.reorder_cache(order)
    ids, mask = (x.repeat_interleave(2, 0)[chosen][order] for x in (ids, mask))
    torch.manual_seed(6)
    return [generate(model, ids, cache, attention_mask=mask, do_sample=True)]


SCENARIOS: list[Scenario] = [
    greedy,
    sampling,
    left_padded,
    beams,
    chunks_of_7,
    chunks_of_50,
    left_padded_chunks,
    prompt_lookup,
    assisted,
    rewinds,
    turns_with_full_ids,
    turns_with_new_ids,
    turns_with_inner_pads,
    forks,
    save_and_load,
    reset_and_reuse,
    two_threads,
    batch_operations,
]


# --- what scenarios are made of ---


def tokens(rows: int, count: int, seed: int = 0) -> Tensor:
    """Random ids, never the pad."""
    generator = torch.Generator().manual_seed(1000 * seed + 10 * rows + count)
    return torch.randint(PAD + 1, VOCAB, (rows, count), generator=generator)


def padded_tokens(*pads: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(ids, mask) of one row per number of pads on its left."""
    ids = tokens(len(pads), PROMPT, seed)
    mask = (torch.arange(PROMPT) >= torch.tensor(pads)[:, None]).long()
    return ids.where(mask > 0, PAD), mask


def generate(model: PreTrainedModel, ids: Tensor, cache: Cache, **settings) -> Tensor:
    """Ids given and new. `settings` override greedy decoding of NEW tokens under a mask of ones."""
    defaults = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "do_sample": False}
    return model.generate(ids, past_key_values=cache, **(defaults | settings))


@torch.no_grad()
def feed(model: PreTrainedModel, ids: Tensor, cache: Cache, chunk: int | None = None, mask: Tensor | None = None):
    """Prefill by hand what the cache does not hold yet, `chunk` tokens at a time."""
    chunk = chunk or ids.shape[1]
    for start in range(cache.get_seq_length(), ids.shape[1], chunk):
        end = min(start + chunk, ids.shape[1])
        extra = {}
        if mask is not None:
            positions = (mask.cumsum(1) - 1).clamp_min(0)
            extra = {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end]}
        model(ids[:, start:end], past_key_values=cache, use_cache=True, **extra)

"""Masks and positions mean what they mean for DynamicCache, or are refused before anything has run."""

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

import kvshrink
from kvshrink import RTN
from kvshrink.errors import CacheError
from tests.scenarios.families import reference, subject
from tests.scenarios.scenarios import tokens

T = 100  # tokens before the last turn: three pages have left a window of 1
LOWEST = torch.finfo(torch.float32).min
METHOD = RTN(bits=None, window=1, sinks=2)


def causal(s: int, t: int) -> Tensor:
    return torch.ones(s, t, dtype=torch.bool).tril(t - s)[None, None]


def additive(mask: Tensor, low: float = LOWEST) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, low)


def packed() -> Tensor:
    """Two documents side by side."""
    mask = causal(T, T).clone()
    mask[..., T // 2 :, : T // 2] = False
    return mask


def tree() -> Tensor:
    """Each token continues one of two branches."""
    own = torch.arange(T) % 2
    return causal(T, T) & (own[:, None] == own)


def without(columns: slice) -> Tensor:
    mask = torch.ones(2, T, dtype=torch.long)
    mask[0, columns] = 0
    return mask


def turn(columns: slice) -> Tensor:
    """The last token of a document, or of a branch."""
    mask = torch.zeros(1, 1, 1, T + 1, dtype=torch.bool)
    mask[..., columns] = True
    mask[..., -1] = True
    return mask


def slopes(s: int, t: int) -> Tensor:
    """ALiBi's biases: by head and distance."""
    distance = torch.arange(t) - torch.arange(t - s, t)[:, None]
    bias = torch.tensor([0.5, 0.25, 0.125, 0.0625])[None, :, None, None] * distance
    return bias.masked_fill(~causal(s, t), LOWEST)


def both(family: str, masks: list, positions: list, rows: int) -> list[tuple[Tensor, Tensor]]:
    """(ours, DynamicCache's) logits of two steps, of T tokens and of one."""
    found = []
    for model, cache in (
        (subject(family), kvshrink.make_cache(subject(family), METHOD)),
        (reference(family), DynamicCache(config=reference(family).config)),
    ):
        with torch.no_grad():
            found.append(
                [
                    model(ids, attention_mask=m, position_ids=p, past_key_values=cache).logits
                    for ids, m, p in zip((tokens(rows, T), tokens(rows, 1)), masks, positions, strict=True)
                ]
            )
    return list(zip(*found, strict=True))


CASES = {
    "packed documents": [packed(), turn(slice(0, T // 2))],
    "packed documents, added": [additive(packed()), additive(turn(slice(T // 2, T)))],
    "a tree longer than the window": [tree(), turn(slice(0, T, 2))],
    "the other branch of a tree": [tree(), turn(slice(1, T, 2))],
    "a large negative number": [additive(causal(T, T), -1e4), additive(turn(slice(0, 40)), -1e4)],
    "infinity": [additive(causal(T, T), -torch.inf), additive(turn(slice(0, 40)), -torch.inf)],
    "biases": [slopes(T, T), slopes(1, T + 1)],
    "whole numbers": [without(slice(0, 40)), torch.cat([without(slice(0, 40)), torch.ones(2, 1, dtype=torch.long)], 1)],
    "other whole numbers": [
        without(slice(0, 9)) * -3,
        torch.cat([without(slice(0, 9)) * 7, torch.ones(2, 1).long()], 1),
    ],
    "floats": [without(slice(60, 99)).float(), torch.cat([without(slice(60, 99)), torch.ones(2, 1)], 1)],
    "bools": [without(slice(30, 70)).bool(), torch.cat([without(slice(30, 70)), torch.ones(2, 1)], 1).bool()],
    "hidden later": [None, torch.cat([without(slice(0, 50)), torch.ones(2, 1, dtype=torch.long)], 1)],
    "the new token hidden": [None, torch.cat([without(slice(0, 50)), torch.zeros(2, 1, dtype=torch.long)], 1)],
}


@pytest.mark.parametrize("name", CASES)
def test_a_mask_means_what_it_means_for_dynamic_cache(name):
    masks = CASES[name]
    rows = next(m for m in masks if m is not None).shape[0]
    (first, wanted), (last, expected) = both("llama", masks, [None, None], rows)
    seen = torch.ones(rows, T, dtype=torch.bool)
    if masks[0] is not None and masks[0].dim() == 2:
        seen = masks[0].bool()
    torch.testing.assert_close(first[seen], wanted[seen], atol=1e-4, rtol=0)
    torch.testing.assert_close(last, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "positions",
    [
        pytest.param(torch.arange(T + 1)[None] * 37, id="jumps"),
        pytest.param(torch.arange(T + 1)[None] // 3, id="repeats"),
        pytest.param(torch.arange(T + 1).flip(0)[None], id="backwards"),
        pytest.param(torch.full((1, T + 1), 5, dtype=torch.int32), id="all_the_same"),
        pytest.param(torch.stack([torch.arange(T + 1), torch.arange(T + 1) + 50]), id="by_row"),
    ],
)
@pytest.mark.parametrize("family", ["llama", "glm4"])
def test_positions_are_the_ones_given(family, positions):
    pairs = both(family, [None, None], [positions[:, :T], positions[:, T:]], 2)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def padded(family: str = "llama") -> kvshrink.KVCache:
    """A cache whose first row begins with 40 pads."""
    cache = kvshrink.make_cache(subject(family), METHOD)
    with torch.no_grad():
        subject(family)(tokens(2, T), attention_mask=without(slice(0, 40)), past_key_values=cache)
    return cache


def shown_again() -> Tensor:
    mask = torch.cat([without(slice(0, 40)), torch.ones(2, 1, dtype=torch.long)], 1)
    mask[0, 30] = 1
    return mask


GOOD = torch.cat([without(slice(0, 40)), torch.ones(2, 1, dtype=torch.long)], 1)
WRONG = {
    "a pad shown again": ({"attention_mask": shown_again()}, "shows column 30 of row 0, which no token saw"),
    "a pad shown by a 4-D mask": ({"attention_mask": causal(1, T + 1)}, "shows column 0 of row 0"),
    "no mask": ({}, "40 columns of row 0 are pads, which would be seen without it"),
    "4-D whole numbers": ({"attention_mask": causal(1, T + 1).long()}, "can mean two things"),
    "NaN": ({"attention_mask": additive(causal(1, T + 1)).fill_(torch.nan)}, r"NaN or \+inf"),
    "infinite": ({"attention_mask": additive(causal(1, T + 1)).fill_(torch.inf)}, r"NaN or \+inf"),
    "another dtype": ({"attention_mask": additive(causal(1, T + 1)).double()}, "torch.float64 for a model of"),
    "3-D": ({"attention_mask": torch.ones(2, 1, T + 1)}, r"it must be \(2, 101\), or"),
    "1-D": ({"attention_mask": torch.ones(T + 1)}, r"it must be \(2, 101\), or"),
    "another batch": ({"attention_mask": torch.ones(3, T + 1)}, r"shape \(3, 101\)"),
    "a list": ({"attention_mask": [[1] * (T + 1)] * 2}, "is a list"),
    "negative positions": ({"position_ids": torch.tensor([[-1]])}, "go from -1 to -1"),
    "positions beyond 32 bits": ({"position_ids": torch.tensor([[2**31]])}, "go from 2147483648"),
    "positions in between": ({"position_ids": torch.tensor([[60.5]])}, "whole numbers"),
    "positions of three axes": ({"position_ids": torch.full((3, 2, 1), 60)}, "whole numbers"),
    "positions of another step": ({"position_ids": torch.arange(5)[None]}, r"whole numbers, \(2, 1\)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_honoured_is_refused_and_changes_nothing(name):
    given, message = WRONG[name]
    given = given if "attention_mask" in given or name == "no mask" else {"attention_mask": GOOD, **given}
    cache = padded()
    with pytest.raises(CacheError, match=message) as error:
        subject("llama")(tokens(2, 1), past_key_values=cache, **given)
    assert "\n" not in str(error.value)
    full = DynamicCache(config=reference("llama").config)
    with torch.no_grad():
        reference("llama")(tokens(2, T), attention_mask=without(slice(0, 40)), past_key_values=full)
        expected = reference("llama")(tokens(2, 1), attention_mask=GOOD, past_key_values=full).logits
        got = subject("llama")(tokens(2, 1), attention_mask=GOOD, past_key_values=cache).logits
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_rows_without_pads_need_no_mask():
    cache = padded()
    cache.batch_select_indices(torch.tensor([1]))
    full = DynamicCache(config=reference("llama").config)
    with torch.no_grad():
        reference("llama")(tokens(2, T)[1:], past_key_values=full)
        expected = reference("llama")(tokens(1, 1), past_key_values=full).logits
        got = subject("llama")(tokens(1, 1), past_key_values=cache).logits
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_a_4_d_mask_is_refused_once_a_sliding_layer_has_let_columns_go():
    cache = kvshrink.make_cache(subject("gemma3"), METHOD)
    with torch.no_grad():
        subject("gemma3")(tokens(1, 30), past_key_values=cache)
    with pytest.raises(CacheError, match="covers 31 columns, but layers with a sliding window hold 16"):
        subject("gemma3")(tokens(1, 1), attention_mask=causal(1, 31), past_key_values=cache)
    assert cache.get_seq_length() == 30
    cache.check_whole()


def test_eager_attention_adds_bools_to_the_scores():
    """So that a bool mask hides nothing there; floats do."""
    cache = kvshrink.make_cache(subject("gemma2"), METHOD)
    with pytest.raises(CacheError, match="Pass floats, 0 where a token is seen"):
        subject("gemma2")(tokens(1, 10), attention_mask=causal(10, 10), past_key_values=cache)
    with torch.no_grad():
        got = subject("gemma2")(tokens(1, 10), attention_mask=additive(causal(10, 10)), past_key_values=cache).logits
        wanted = reference("gemma2")(tokens(1, 10)).logits
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)


def test_an_implementation_chosen_and_given_back_leaves_masks_their_meaning():
    """By the bare name, as transformers lets anyone choose one."""
    model = LlamaForCausalLM(reference("llama").config).eval()
    model.load_state_dict(reference("llama").state_dict())
    cache = kvshrink.make_cache(model, METHOD)
    for name in ("eager", "kvshrink"):
        model.set_attn_implementation(name)
    with torch.no_grad():
        got = model(tokens(1, T), attention_mask=packed(), past_key_values=cache).logits
        wanted = reference("llama")(tokens(1, T), attention_mask=packed()).logits
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)

"""A cache that is filled from a shared prefill is the one that the model itself would have filled."""

import pytest
import torch

import kvshrink
from kvshrink import methods
from kvshrink.attach import attach, make_cache
from kvshrink.attach.fill import fill, prefill, wanted_by

# that choose tokens, but for those that are fitted, and the one that ranks none
CHOOSING = [n for n, path in methods.names().items() if ".evict." in path and methods.get(n).needs_fit is False]
CHOOSING.remove("streaming_llm")


@pytest.fixture(scope="module")
def model():
    return kvshrink.reference_model("float32")[0]


@torch.inference_mode()
@pytest.mark.parametrize("name", ["rtn", "zipcache", "edgeqat", *CHOOSING])
@pytest.mark.parametrize("padded", [False, True])
def test_filled_pages_are_those_of_the_model_s_own_prefill(model, name, padded):
    ids = torch.randint(10, 3000, (2, 400), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :70] = 0 if padded else 1
    attachment, method = attach(model), methods.get(name)()
    own = make_cache(model, method)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=own)
    filled = make_cache(model, method)
    shown = mask if padded else None
    fill(filled, prefill(model, ids, shown, wanted_by([methods.get("zipcache")(), method])), attachment, shown)
    for mine, theirs in zip(filled.layers, own.layers, strict=True):
        assert len(mine.body) == len(theirs.body) > 0
        (mine, mine_held), (theirs, theirs_held) = mine.state(), theirs.state()
        assert (mine, mine_held.keys()) == (theirs, theirs_held.keys())
        for part, t in mine_held.items():
            if part.endswith("importance"):  # a single query is another product than one among others
                torch.testing.assert_close(t, theirs_held[part], rtol=1e-4, atol=1e-7)
            else:
                assert torch.equal(t, theirs_held[part]), part

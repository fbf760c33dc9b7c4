"""Methods that choose tokens on a real model: chunks, turns, rows, forks, crops and files, each against a plain run."""

import copy

import pytest
import torch

import kvshrink
from kvshrink import methods
from kvshrink.attach.budget import promised
from kvshrink.errors import CacheError
from kvshrink.eval.run.entries import parse

OWN = [n for n, path in methods.names().items() if ".evict." in path and methods.get(n).needs_fit is False]
TEXTS = [
    *(f"{name}:ratio=0.3" for name in OWN if name not in ("streaming_llm", "compose")),
    "snapkv:ratio=0.3 + turboquant:bits=4",
    "snapkv:ratio=0.3,schedule=page + turboquant:bits=4",
    "kvzip:ratio=0.3 + kivi:bits=4",
    "kvzip:ratio=0.1,bits=8 + turboquant:bits=4,demote=True",
    "h2o:ratio=0.1 + turboquant:bits=4,demote=True,schedule=page",
]


@pytest.fixture(scope="module")
def model():
    return kvshrink.reference_model("float32")[0]


def ids_of(rows: int, tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(10, 3000, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def fed(model, cache, *parts: torch.Tensor) -> torch.Tensor:
    """The last logits."""
    for ids in parts:
        out = model(input_ids=ids, past_key_values=cache)
    return out.logits[:, -1]


def one_by_one(ids: torch.Tensor) -> list[torch.Tensor]:
    return list(ids.split(1, 1))


@pytest.mark.parametrize("text", TEXTS)
def test_turns_forks_rows_crops_and_files(model, text, tmp_path):
    method, (prompt, more) = parse(text).method, (ids_of(2, 400), ids_of(2, 40, seed=1))
    cache = kvshrink.make_cache(model, method)
    fed(model, cache, prompt, *one_by_one(more))
    turn = ids_of(2, 70, seed=2)
    fork = copy.deepcopy(cache)
    want = fed(model, cache, turn, *one_by_one(more[:, :5]))
    torch.testing.assert_close(fed(model, fork, turn, *one_by_one(more[:, :5])), want)

    path = tmp_path / "cache"
    cache.save(path)
    loaded = kvshrink.make_cache(model, method)
    loaded.load(path)
    assert loaded.nbytes <= cache.nbytes <= 1.1 * loaded.nbytes  # with what decoding has looked up
    next_token = ids_of(2, 1, seed=3)
    want = fed(model, copy.deepcopy(cache), next_token)
    torch.testing.assert_close(fed(model, loaded, next_token), want)

    rows = cache.split()
    alone = [fed(model, row, next_token[i : i + 1]) for i, row in enumerate(rows)]
    torch.testing.assert_close(torch.cat(alone), want, atol=1e-4, rtol=1e-4)
    turned = copy.deepcopy(cache)
    turned.reorder_cache(torch.tensor([1, 1]))
    got = fed(model, turned, next_token[[1, 1]])
    torch.testing.assert_close(got, want[[1, 1]], atol=1e-4, rtol=1e-4)

    cut = copy.deepcopy(cache)
    cut.crop(-3)
    fed(model, cut, ids_of(2, 3, seed=4), next_token)
    if cache.compressed[0].body.drops:
        with pytest.raises(CacheError, match=r"cannot crop 300 tokens: [^\n]+$"):
            cut.crop(-300)


@pytest.mark.parametrize("chunk", [48, 96, 160, 1056])
def test_a_prompt_in_any_chunks_keeps_the_share_and_a_question_in_between_stays(model, chunk):
    cache = kvshrink.make_cache(model, parse("kvzip:ratio=0.5").method)
    fed(model, cache, *ids_of(1, 1056).split(chunk, 1))
    heads = [int(n) for layer in cache.compressed for n in layer.body.youngest.tokens.flatten()]
    assert sum(heads) == pytest.approx(0.5 * 1024 * len(heads), rel=0.08)
    fed(model, cache, *one_by_one(ids_of(1, 20)), ids_of(1, 20, seed=5), *one_by_one(ids_of(1, 100)), ids_of(1, 100))
    for layer in cache.compressed:
        for own in layer.body.youngest.slots[0].tolist():
            assert set(range(1076, 1096)) <= set(own), "a turn of 20 tokens, as what is decoded"


def test_rows_that_join_are_judged_as_alone(model):
    """Whatever their lengths: what stands before a row's own tokens says nothing of them."""
    for text in ("a2sf:ratio=0.4", "snapkv:ratio=0.4", "lagkv:ratio=0.4", "zipvl:ratio=0.4", "kvcrush:ratio=0.4"):
        alone = []
        for i, tokens in enumerate((90, 333)):
            cache = kvshrink.make_cache(model, parse(text).method)
            fed(model, cache, ids_of(1, tokens, seed=i))
            alone.append(cache)
        both = kvshrink.KVCache.join(alone)
        more = ids_of(2, 77, seed=9)
        mask = torch.cat([both.attention_mask, torch.ones_like(more)], 1)
        at = torch.stack([torch.arange(n, n + 77) for n in (90, 333)])
        with torch.inference_mode():
            got = model(input_ids=more, attention_mask=mask, position_ids=at, past_key_values=both).logits[:, -1]
        want = [fed(model, cache, more[i : i + 1]) for i, cache in enumerate(alone)]
        torch.testing.assert_close(got, torch.cat(want), atol=1e-4, rtol=1e-4)
        for i, cache in enumerate(alone):
            for mine, theirs in zip(both.compressed, cache.compressed, strict=True):
                own = [{c for c in x if c >= 0} for x in mine.body.youngest.slots[i].tolist()]
                assert own == [{c for c in x if c >= 0} for x in theirs.body.youngest.slots[0].tolist()], text


@pytest.mark.parametrize("name", ["h2o", "a2sf", "scissorhands", "tova"])
def test_tokens_are_demoted_where_none_was_chosen_before(model, name):
    cache = kvshrink.make_cache(model, parse(f"{name} + turboquant:bits=4,demote=True,schedule=page").method)
    fed(model, cache, ids_of(1, 10), *one_by_one(ids_of(1, 150)))
    assert len(cache.compressed[0].body.ages[0].pages) > 0


@pytest.mark.parametrize("text", ["kvzip:ratio=0.3", "kvzip:ratio=0.3,per='layer'", "kvzip:ratio=0.3,per='even'"])
@pytest.mark.parametrize("store", ["turboquant:bits=4", "cskv:keep=0.5"])
def test_tokens_of_a_whole_model_are_as_many_as_promised_in_lanes_of_one_head_or_of_all(model, text, store):
    own = parse(f"{text} + {store}").method
    method = kvshrink.fit(model, own, ids_of(8, 256), progress=False) if own.needs_fit else own
    cache = kvshrink.make_cache(model, method)
    fed(model, cache, ids_of(1, 700))
    assert cache.nbytes / cache.report().full == pytest.approx(promised(own, model, 700), rel=0.01)


@pytest.mark.parametrize("text", TEXTS)
def test_chunks_keep_the_budget_of_one_prompt_and_no_pad(model, text):
    """Of a row behind 64 pads nothing but tokens is held; a prompt in four chunks holds no more than in one."""
    method, ids = parse(text).method, ids_of(2, 512)
    mask = torch.ones_like(ids)
    mask[1, :64] = 0
    held = []
    for chunks in (1, 4):
        cache = kvshrink.make_cache(model, method)
        with torch.inference_mode():
            for at in range(0, 512, 512 // chunks):
                end = at + 512 // chunks
                positions = (mask.cumsum(1) - 1).clamp_min(0)[:, at:end]
                given = {"attention_mask": mask[:, :end], "position_ids": positions}
                model(input_ids=ids[:, at:end], past_key_values=cache, **given)
        for layer in cache.compressed:
            columns = layer.body.youngest.slots[1]
            assert not ((columns >= 0) & (columns < 64 + 4)).any(), "a pad, or a sink, was chosen"
        held.append(cache.nbytes)
    # what of a chunk is in its window is judged with it, and joins the next one's choice in whole pages
    assert held[1] == pytest.approx(held[0], rel=0.15 if "kvzip" in text else 0.06)

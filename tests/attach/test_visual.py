"""Tokens of images under a method of their own: which pages, how many bytes, and what every operation makes of them."""

import copy

import pytest
import torch

import kvshrink
from kvshrink import RTN, Full, Spectral, fit
from kvshrink.attach.budget import promised
from kvshrink.errors import CacheError, SettingError
from kvshrink.methods.evict.adakv import AdaKV
from kvshrink.methods.evict.snapkv import SnapKV
from kvshrink.methods.quant.kivi import KIVI
from kvshrink.methods.quant.turboquant import TurboQuant
from kvshrink.methods.visual import visual_bytes
from tests.bench.test_images import MODELS, answered, built

PAGE = 32
START, IMAGE = 21, 20 * 32 // 4  # the image's first column and its tokens: pages 1 to 4 are all image, 0 and 5 in part
VISUAL = range(1, 5)


def filled(model, given, method, chunks=(1000,)):
    """A cache of the prompt, given in chunks, the image with the first one."""
    cache, at = kvshrink.make_cache(model, method), 0
    total = given["input_ids"].shape[1]
    for size in chunks:
        stop = min(at + size, total)
        part = {"input_ids": given["input_ids"][:, at:stop]}
        if at == 0:  # the model counts positions of what comes later itself
            part = {**given, **part} | {k: given[k][:, :stop] for k in ("mm_token_type_ids", "attention_mask")}
        with torch.no_grad():
            model(**part, past_key_values=cache)
        at = stop
    return cache


def pages_of(layer, row=0):
    """First columns of the pages of text and of images."""
    return tuple(
        [int(x) for x, there in zip(age.pages.first[row], age.pages.table[row, 0], strict=True) if there]
        for age in (layer.body.ages[0], layer.body.ages[-1])
    )


@pytest.fixture(scope="module")
def qwen():
    return built("qwen2_5_vl", 20, 32)


def test_pages_of_images_alone_have_their_own_bits(qwen):
    model, given = qwen
    cache = filled(model, given, RTN(bits=4, visual="rtn:bits=2"))
    total = given["input_ids"].shape[1]
    text, images = pages_of(cache.layers[0])
    assert images == [PAGE * n for n in VISUAL]
    left = (total - 32) // PAGE
    assert text == [PAGE * n for n in range(left) if n not in VISUAL]
    assert cache.table.visual.sum() == IMAGE
    assert [x.body.ages[-1].pages.layout.size < x.body.ages[0].pages.layout.size for x in cache.layers] == [True, True]


@pytest.mark.parametrize(
    "method",
    [
        RTN(bits=4, visual="rtn:bits=2"),
        TurboQuant(bits=4, visual="vidkv"),
        KIVI(bits=4, visual="turboquant:bits=2"),
        Full(visual="turboquant:bits=4"),
        TurboQuant(bits=2, visual="rtn:bits=8"),
        SnapKV(ratio=0.5, visual_ratio=0.2),
        AdaKV(ratio=0.3, visual_ratio=1.0, bits=4),
    ],
)
def test_bytes_are_those_that_were_promised(qwen, method):
    model, given = qwen
    total, n = given["input_ids"].shape[1], PAGE * len(VISUAL)
    cache = filled(model, given, method)
    for layer in cache.layers:
        wanted = method.layer_bytes(layer.shape, {}, total) + visual_bytes(method, layer.shape, {}, total, n)
        assert layer.held().total == wanted
    plain = promised(method, model, total)
    assert promised(method, model, total, n) != plain


def test_what_images_are_read_from_is_what_their_method_stores(qwen):
    """Lossless text beside lossless images is the full cache; a coarse image alone changes the answer."""
    model, given = qwen
    tail = {"input_ids": torch.randint(3, 110, (1, 12), generator=torch.Generator().manual_seed(3))}
    methods = {
        "exact": Full(),
        "both exact": RTN(bits=None, visual="rtn:bits=None"),
        "image": RTN(bits=None, visual="rtn:bits=2"),
        "all": RTN(bits=2),
    }
    logits = {}
    for name, method in methods.items():
        cache = filled(model, given, method)
        with torch.no_grad():
            logits[name] = model(**tail, past_key_values=cache).logits
    scale = float(logits["exact"].abs().max())
    off = {name: float((x - logits["exact"]).abs().max()) / scale for name, x in logits.items()}
    assert off["both exact"] < 1e-5
    assert 1e-3 < off["image"] < off["all"]


def test_images_compete_among_themselves(qwen):
    """What each head keeps of text and of the image: shares of each, the most important ones of SnapKV's vote."""
    model, given = qwen
    total = given["input_ids"].shape[1]
    left = (total - 32) // PAGE
    every = filled(model, given, SnapKV(ratio=1.0)).layers[0].body.youngest
    kept = filled(model, given, SnapKV(ratio=0.5, visual_ratio=0.2)).layers[0].body.youngest
    images = IMAGE // PAGE
    for head in range(kept.lanes):
        columns, votes = every.columns[0, head], every.importance[0, head]
        wanted = []
        for share, pages, of in (
            (0.5, left - images, ~((columns >= START) & (columns < START + IMAGE))),
            (0.2, images, (columns >= START) & (columns < START + IMAGE)),
        ):
            count = -(-round(share * pages * 1000) // 1000) * PAGE
            own = columns[of & (columns >= 0)]
            best = votes[of & (columns >= 0)].argsort(descending=True, stable=True)[:count]
            wanted += own[best].tolist()
        got = kept.columns[0, head]
        assert sorted(wanted) == got[got >= 0].tolist()


def test_chunks_turns_forks_crops_and_files_keep_what_is_of_images(qwen, tmp_path):
    model, given = qwen
    method = TurboQuant(bits=4, visual="turboquant:bits=2")
    whole = filled(model, given, method)
    for chunks in ((START + IMAGE, 17, 500), (START + IMAGE + 3, 40, 500)):
        parts = filled(model, given, method, chunks)
        for a, b in zip(whole.layers, parts.layers, strict=True):
            assert pages_of(a) == pages_of(b)
    tail = {"input_ids": torch.randint(3, 110, (1, 70), generator=torch.Generator().manual_seed(3))}
    whole.save(tmp_path / "cache.safetensors")
    other = kvshrink.make_cache(model, method).load(tmp_path / "cache.safetensors")
    caches = {"whole": whole, "saved": other, "fork": copy.deepcopy(whole), "split": kvshrink.KVCache.join([whole])}
    found = {}
    for name, cache in caches.items():
        with torch.no_grad():
            found[name] = model(**tail, past_key_values=cache).logits
        assert pages_of(cache.layers[1])[1] == [PAGE * n for n in VISUAL], name
        torch.testing.assert_close(found[name], found["whole"], atol=1e-5, rtol=0)
    whole.crop(-(whole.get_seq_length() - 3 * PAGE - 5))  # into the image
    assert pages_of(whole.layers[0])[1] == [PAGE, 2 * PAGE, 3 * PAGE]
    assert whole.table.visual.sum() == 3 * PAGE + 5 - START
    with torch.no_grad():
        model(**tail, past_key_values=whole)
    assert pages_of(whole.layers[0])[1] == [PAGE, 2 * PAGE, 3 * PAGE], "what comes after a crop is text"


def test_rows_whose_images_stand_elsewhere(qwen):
    """A batch of two prompts, one with more text before its image, is what each prompt is by itself."""
    model, given = qwen
    method, ids = TurboQuant(bits=4, visual="turboquant:bits=2"), given["input_ids"]
    more = torch.randint(3, 110, (1, 40), generator=torch.Generator().manual_seed(8))
    long = {**given, "input_ids": torch.cat([more, ids], 1)}
    long["attention_mask"] = torch.ones_like(long["input_ids"])
    long["mm_token_type_ids"] = (long["input_ids"] == 120).int()
    width = long["input_ids"].shape[1]
    pad = torch.zeros(1, width - ids.shape[1], dtype=torch.long)
    both = {"input_ids": torch.cat([torch.cat([pad, ids], 1), long["input_ids"]])}
    both["attention_mask"] = torch.cat([torch.cat([pad, torch.ones_like(ids)], 1), long["attention_mask"]])
    both["mm_token_type_ids"] = (both["input_ids"] == 120).int()
    both["pixel_values"] = given["pixel_values"].repeat(2, 1)
    both["image_grid_thw"] = given["image_grid_thw"].repeat(2, 1)

    def after(prompt):
        cache = kvshrink.make_cache(model, method)
        return cache, answered(model, prompt, cache)[1]

    cache, together = after(both)
    assert pages_of(cache.layers[0], 1)[1] == [PAGE * n for n in (2, 3, 4, 5)]
    assert pages_of(cache.layers[0], 0)[1] == [PAGE * n for n in (2, 3, 4, 5)]
    alone, wanted = after(long)
    torch.testing.assert_close(together[:, 1:], wanted, atol=1e-3, rtol=0)
    assert pages_of(alone.layers[0]) == pages_of(cache.layers[0], 1)
    cache.batch_select_indices(torch.tensor([1, 1, 0]))
    assert cache.table.visual.sum(1).tolist() == [IMAGE] * 3


def test_a_fitted_method_beside_images(qwen):
    model, given = qwen
    rows = torch.randint(3, 110, (8, 256), generator=torch.Generator().manual_seed(1))
    artifact = fit(model, Spectral(budget=0.6, window=8, visual="turboquant:bits=4"), rows)
    cache = filled(model, given, artifact)
    assert len(pages_of(cache.layers[0])[1]) == 4
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[5, 6]]), past_key_values=cache).logits
        full = filled(model, given, Full())
        wanted = model(input_ids=torch.tensor([[5, 6]]), past_key_values=full).logits
    p, q = wanted.log_softmax(-1), logits.log_softmax(-1)
    assert 0 < float((p.exp() * (p - q)).sum(-1).mean()) < 0.1


def test_key_biases_beside_images(qwen):
    """A constant that keys have is kept apart in both tiers."""
    model, given = copy.deepcopy(qwen[0]), qwen[1]
    for layer in model.model.language_model.layers:
        layer.self_attn.k_proj.bias.data[3::16] = 150.0
    tail = {"input_ids": torch.randint(3, 110, (1, 12), generator=torch.Generator().manual_seed(3))}
    off = {}
    with torch.no_grad():
        wanted = model(**tail, past_key_values=filled(model, given, Full())).logits.log_softmax(-1)
        for visual in (None, "turboquant:bits=4"):
            cache = filled(model, given, TurboQuant(bits=4, visual=visual))
            found = model(**tail, past_key_values=cache).logits.log_softmax(-1)
            off[visual] = float((wanted.exp() * (wanted - found)).sum(-1).mean())
    assert off["turboquant:bits=4"] < 1.5 * off[None] + 1e-4


def test_a_model_without_images_and_methods_that_cannot(qwen):
    model, given = qwen
    text, _ = kvshrink.reference_model()
    for blind in (text, model.model.language_model):
        with pytest.raises(SettingError, match="none that can be seen"):
            kvshrink.make_cache(blind, RTN(bits=4, visual="rtn:bits=2"))
    for visual, reason in {
        "nothing": "no method 'nothing'",
        "rtn:bits=5": "bits=5",
        "cskv": "must be fitted",
        "snapkv": "drops tokens",
        "rtn:bits": "is no setting",
        "kivi:group=64": "pages of 64.*Use a method with pages as long",
        "rtn:bits=2,window=99": "window is one for all tokens",
        "rtn:visual=rtn": "image method itself",
    }.items():
        with pytest.raises(SettingError, match=reason):
            kvshrink.make_cache(model, RTN(bits=4, visual=visual))
    with pytest.raises(SettingError, match="no method 'nothing'"):  # before the pass over the text
        fit(model, Spectral(budget=0.6, visual="nothing"), torch.zeros(8, 256, dtype=torch.long))
    with pytest.raises(SettingError, match="drops tokens"):
        kvshrink.methods.build("snapkv", {"visual": "rtn:bits=2"})
    cache = kvshrink.make_cache(model, RTN(bits=4, visual="rtn:bits=2"))
    embeds = model.get_input_embeddings()(given["input_ids"])[:, :50]
    cache.visual = given["mm_token_type_ids"] > 0  # as of a model that spreads an image's id itself
    with torch.no_grad(), pytest.raises(CacheError, match="which of them came from images is not known"):
        model.model.language_model(inputs_embeds=embeds, past_key_values=cache)


@pytest.mark.parametrize("name", MODELS)
def test_an_id_that_the_model_writes_itself_is_no_image(name):
    model, given = built(name, 20, 32)
    cache = filled(model, given, RTN(bits=4, visual="rtn:bits=2"))
    with torch.no_grad():
        model(input_ids=torch.full((1, 1), 120), past_key_values=cache)
    assert cache.table.visual.sum() == IMAGE


def test_attach_and_detach_leave_no_hook(qwen):
    model = copy.deepcopy(qwen[0])
    kvshrink.detach(model)
    before = {name: dict(m._forward_pre_hooks) for name, m in model.named_modules()}
    kvshrink.attach(model.model)
    kvshrink.attach(model)
    assert len(model._forward_pre_hooks) == 1
    kvshrink.detach(model)
    assert {name: dict(m._forward_pre_hooks) for name, m in model.named_modules()} == before

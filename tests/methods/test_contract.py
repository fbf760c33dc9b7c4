"""What every method must satisfy. A new method file is picked up here without editing this file."""

import contextlib
import dataclasses
import importlib
import json
import re
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError
from torch.utils._python_dispatch import TorchDispatchMode

from kvshrink import Full, methods
from kvshrink.cache import attend
from kvshrink.cache.rope import Rope
from kvshrink.errors import DataError
from kvshrink.kernels import native
from kvshrink.kernels.pack.reference import WIDTHS
from kvshrink.methods._packing import Codebook
from kvshrink.methods._stats import SOME, LayerShape
from kvshrink.store.bytes import nbytes
from kvshrink.store.growth import slots_for
from tests.cache.build import feed, make

SHAPES = [(1, 16), (2, 8), (4, 20)]  # KV heads, head dim; not only powers of two
F32 = torch.float32
TRIED = {
    "bits": (None, *reversed(WIDTHS), 1.5),
    "keep": (0.5,),
}  # settings tried wherever a method has them and takes them


def cases() -> list:
    """Every method, and every value of TRIED that it does not refuse."""
    found = []
    for name in methods.names():
        fields = {f.name for f in dataclasses.fields(methods.get(name))}
        keep = {"keep": TRIED["keep"][0]} if "keep" in fields else {}
        for bits in TRIED["bits"] if "bits" in fields else ("-",):
            settings = keep | ({} if bits == "-" else {"bits": bits})
            try:
                found.append(pytest.param(methods.build(name, settings), id=f"{name}-{bits}"))
            except (methods.SettingError, TypeError):  # refused, by its check or by its annotation
                continue
    return found


def narrowest() -> list:
    """Of each method the last of its cases, with the fewest bits: the more there is to unpack."""
    return list({type(case.values[0]): case for case in cases()}.values())


@pytest.fixture(params=cases())
def method(request):
    return request.param


@pytest.fixture(params=SHAPES, ids=lambda s: f"h{s[0]}d{s[1]}")
def shape(request):
    return LayerShape(*request.param, torch.float32)


@pytest.fixture
def fit(stats_of):
    """A function from method and shape to fitted tensors."""
    return lambda method, shape: method.fit_layer(stats_of(shape)) if method.needs_fit else {}


@pytest.fixture
def codecs(method, shape, fit):
    """The method's codecs; a method that drops tokens may have none, and nothing to test here."""
    pair = method.codecs(shape, fit(method, shape))
    assert pair is not None or method.drops_tokens
    return pair or ()


@pytest.fixture
def page(method) -> int:
    return method.page


@pytest.fixture
def rows_of(page):
    """A function from a shape and a number of pages to rows."""

    def make(shape, pages: int, b: int = 2) -> torch.Tensor:
        return (torch.randn(b, shape.heads, pages * page, shape.head_dim) * 2 + 1).to(shape.dtype)

    return make


def test_every_file_is_found():
    folder = Path(methods.__file__).parent
    files = {p.stem for p in folder.glob("[!_]*/*.py") if not p.stem.startswith("_")}
    assert set(methods.names()) == files
    assert {methods.name_of(p.values[0]) for p in cases()} == files, "no setting of some method could be built"


@pytest.mark.parametrize("pages", [1, 3])
def test_round_trip_keeps_shape_and_input(codecs, shape, pages, rows_of):
    for codec in codecs:
        rows = rows_of(shape, pages)
        before = rows.clone()
        back = codec.decode(codec.encode(rows, None), shape.heads)
        assert back.shape == rows.shape
        assert back.dtype == torch.float32
        assert back.isfinite().all()
        assert torch.equal(rows, before), "encode must not change its input"


@pytest.mark.parametrize("pages", [1, 3])
def test_promised_page_bytes_are_the_bytes_held(codecs, shape, pages, rows_of):
    for codec in codecs:
        stored = codec.encode(rows_of(shape, pages), None)
        assert sum(t.nbytes for t in stored.values()) == nbytes(stored.values()) == 2 * pages * codec.page_bytes()
        assert all(t.shape[:2] == (2, pages) for t in stored.values())
        assert codec.metadata <= set(stored) | {"scale", "low"}


@pytest.mark.parametrize("name", methods.names())
def test_a_saved_cache_is_taken_over_as_it_was(name, fit):
    """What a cache's description implies of its tensors is what they are, for every method, and they are read."""
    method, shape = next(p.values[0] for p in cases() if methods.name_of(p.values[0]) == name), LayerShape(4, 20, F32)
    fitted = [fit(method, shape)]
    cache, other = make(method, shape, fitted), make(method, shape, fitted)
    rows, real = torch.randn(2, 4, 240, 20), torch.ones(2, 240, dtype=torch.bool)
    real[1, :37] = False
    feed(cache, [rows], [rows.clone()], real=real, asked=True)
    state = cache.state_dict()
    back = other.load_state_dict(state).state_dict()
    assert back.keys() == state.keys()
    assert all(torch.equal(back[k], t) for k, t in state.items())


def test_pages_do_not_hold_on_to_the_model_s_tensors(codecs, shape, rows_of, page):
    """A page that is a view of the prompt's keys would keep all of them alive."""
    for codec in codecs:
        stored = codec.encode(rows_of(shape, 5, b=1)[:, :, :page], None)
        assert nbytes(stored.values()) == codec.page_bytes()


def test_promised_bits_are_those_of_the_pages(method, shape, fit):
    fitted = fit(method, shape)
    pair = method.codecs(shape, fitted)
    promised = method.bits_per_token(shape, fitted)
    assert promised == (sum(c.page_bytes() for c in pair) * 8 / method.page if pair else 0)
    assert promised < shape.token_bytes * 8 or getattr(method, "bits", 0) in (None, 8) or isinstance(method, Full), (
        "a method must save bytes"
    )


@pytest.mark.parametrize("b", [1, 2])
def test_a_layer_holds_what_the_method_promises(method, shape, fit, b):
    """After a prefill of any length: shorter than the window, up to the brim of its buffer, beyond it."""
    fitted, capacity = fit(method, shape), method.window + method.page
    lengths = (1, method.window, capacity, capacity + 1, capacity + method.sinks, capacity + method.sinks + 1)
    if len(method.tiers(shape, fitted)) > 1:
        lengths += (capacity + 300, 2500)
    for tokens in (*lengths, capacity + 3 * method.page, capacity + 4 * method.page - 1):
        cache = make(method, shape, [fitted])
        rows = torch.randn(b, shape.heads, tokens, shape.head_dim)
        feed(cache, [rows], [rows.clone()], asked=True)
        held, promised = cache.layers[0].held(), method.layer_bytes(shape, fitted, tokens, b)
        assert held.total == promised, f"{tokens} tokens"
        assert cache.nbytes == held.total + b * 4 * slots_for(tokens, 256)


def test_pages_appended_one_by_one_equal_all_at_once(codecs, shape, rows_of, page):
    for codec in codecs:
        rows = rows_of(shape, 4)
        whole = codec.decode(codec.encode(rows, None), shape.heads)
        parts = [codec.decode(codec.encode(part, None), shape.heads) for part in rows.split(page, 2)]
        torch.testing.assert_close(torch.cat(parts, 2), whole, atol=1e-4, rtol=0)


def test_picked_tokens_are_those_of_the_whole(codecs, shape, rows_of, page):
    """Each row picks its own, in any order, and one of them twice."""
    tokens = torch.tensor([3 * page - 1, 0, page - 1, page, page - 1, 2 * page - 1, 2 * page, 7, 8])
    tokens = torch.stack([torch.randperm(3 * page)[:9], tokens])
    for codec in codecs:
        stored = codec.encode(rows_of(shape, 3), None)
        whole = codec.unpack(stored)
        want = torch.stack([row[:, at] for row, at in zip(whole, tokens, strict=True)])
        assert torch.equal(codec.pick(stored, tokens), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_dtypes_lose_little_against_float32(method, shape, fit, dtype, rows_of):
    fitted, small = fit(method, shape), dataclasses.replace(shape, dtype=dtype)
    for codec, wide in zip(method.codecs(small, fitted) or (), method.codecs(shape, fitted) or (), strict=True):
        rows = rows_of(small, 2)
        stored = codec.encode(rows, None)
        assert sum(t.nbytes for t in stored.values()) == 4 * codec.page_bytes()
        back, want = codec.decode(stored, 4), wide.decode(wide.encode(rows.float(), None), 4)
        assert (back - want).norm() / want.norm() < 2 ** (-10 if dtype == torch.float16 else -7)


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), 1e30])
def test_left_pads_do_not_matter(codecs, shape, junk, rows_of, page):
    valid = torch.arange(2 * page) >= torch.tensor(
        [[0], [5], [page], [2 * page]]
    )  # none, some, a whole page, everything
    for codec in codecs:
        rows = rows_of(shape, 2, b=4)
        pad = ~valid[:, None, :, None]
        clean = codec.encode(rows.masked_fill(pad, 0.0), valid)
        dirty = codec.encode(rows.masked_fill(pad, junk), valid)
        for key, tensor in clean.items():
            assert torch.equal(tensor, dirty[key])
        assert codec.decode(dirty, shape.heads).isfinite().all()


def test_values_that_are_not_finite_are_refused(codecs, shape, rows_of, page):
    for codec in codecs:
        for bad in (float("nan"), float("inf"), -float("inf")):
            rows = rows_of(shape, 2)
            rows[1, -1, page + 8, 3] = bad
            for valid in (None, torch.ones(2, 2 * page, dtype=torch.bool)):
                with pytest.raises(DataError, match=r"^[^\n]+$"):
                    codec.encode(rows, valid)


def test_equal_tokens_come_back_equal_and_the_zero_latent_exactly(codecs, shape, rows_of, page):
    """A constant group has scale 0 and must not divide by it. Important tokens may come back as another number."""
    for codec in codecs:
        row = rows_of(shape, 1, b=1)[:, :, :1]
        back = codec.decode(codec.encode(row.expand(-1, -1, page, -1), None), shape.heads)
        # a product of matrices may differ in its last digit from row to row
        kinds = [back[:, :, :1], back[:, :, -1:]] if codec.needs_importance else [back[:, :, :1]]
        if getattr(getattr(codec, "packing", None), "form", "") != "trellis":  # it codes a page's tokens together
            assert torch.stack([(back - kind).abs().amax(3) for kind in kinds]).amin(0).max() < 1e-5
        latent = torch.zeros_like(codec.unpack(codec.encode(row.expand(-1, -1, page, -1), None)))
        centre = codec.expand(latent, shape.heads)
        far = 1e-5 + half_a_step(codec)
        torch.testing.assert_close(codec.decode(codec.encode(centre, None), shape.heads), centre, atol=far, rtol=0)


def half_a_step(codec) -> float:
    """Half the widest step, in units of rows, of a table that stands still: it need have no level at 0. Else 0."""
    found = getattr(codec, "packing", None)
    while hasattr(found, "inner"):
        found = found.inner
    if not isinstance(found, Codebook) or found.scale != "one":
        return 0.0
    table = found.levels if found.read is None else found.read
    below, above = found.levels[found.levels <= 0].max(), found.levels[found.levels > 0].min()
    assert below < 0 < above, "a table that ends at 0, or on one side of it"
    return float(table.diff().max() / 2 * codec.up.abs().max())


def test_nothing_drifts_while_a_thousand_tokens_are_appended(method, stats_of):
    """What is in the body never changes: whatever runs it lies in, what is still held of a page is the same bits.

    Where tokens are chosen they move to other pages: what is still held of a token comes back as the same numbers.
    """
    shape = LayerShape(2, 8, torch.float32)
    cache = make(method, shape, [method.fit_layer(stats_of(shape)) if method.needs_fit else {}])
    layer = cache.layers[0]
    chooses = method.policy(shape, {}).budget is not None

    def append(tokens: int) -> None:
        k, v = torch.randn(2, 1, 2, tokens, 8)
        feed(cache, [k], [v], asked=chooses)

    def body() -> dict[int, dict[str, torch.Tensor]]:
        """The tensors of each page, by its column."""
        found = {}
        for pages in (age.pages for age in layer.body.ages if len(age.pages)):
            records = pages.records()
            stored = [{k: records[k][:, i].clone() for k in records} for i in range(len(pages))]
            found |= dict(zip(pages.first[0].tolist(), stored, strict=True))
        return found

    def tokens() -> dict[tuple[int, int], dict[str, torch.Tensor]]:
        """What each token comes back as, by its head and column."""
        records, slots = layer.pages.records(), layer.pages.slots[0].expand(2, -1)  # of one lane for both heads
        rows = [codec.decode(records.under(f"{kv}."), 2)[0] for kv, codec in zip("kv", layer.codecs, strict=True)]
        heads, at = (slots >= 0).nonzero(as_tuple=True)
        assert len(slots) == 2
        found = zip(heads.tolist(), at.tolist(), slots[heads, at].tolist(), strict=True)
        return {(h, column): {kv: x[h, i] for kv, x in zip("kv", rows, strict=True)} for h, i, column in found}

    first = method.window + method.sinks + 8 * method.page
    append(first)
    before = tokens() if chooses else body()
    assert bool(before) == (layer.codecs is not None)
    for more in (1,) * 80 + (20,) * 46:
        append(more)
        if layer.seen in (first + 80, first + 1000):
            after = tokens() if chooses else body()
            assert method.drops_tokens or set(before) <= set(after)
            assert set(before) & set(after) or layer.seen > first + 80 or layer.codecs is None
            for place in set(before) & set(after):
                assert set(after[place]) <= set(before[place])
                assert all(torch.equal(t, before[place][name]) for name, t in after[place].items())
    assert len(after) > len(before) or layer.codecs is None


@pytest.mark.parametrize("name", methods.names())
def test_form(name):
    """Frozen, final, documented with its source; settings survive JSON."""
    cls = methods.get(name)
    module = importlib.import_module(methods.names()[name])
    assert cls.__dataclass_params__.frozen
    assert getattr(cls, "__final__", False), "methods are final: wrap, do not subclass"
    assert re.search(r"\b\d{4}\.\d{5}\b|baseline", module.__doc__), "name the paper's arXiv id, or say 'baseline'"
    assert cls.__doc__
    assert not cls.__doc__.startswith(f"{cls.__name__}("), "the docstring that dataclass makes says nothing"
    method = cls()
    assert methods.build(name, json.loads(json.dumps(method.settings()))) == method
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.window = 1


@pytest.mark.parametrize("name", methods.names())
def test_a_setting_of_the_wrong_type_is_refused_in_one_line(name):
    """As the command line may give it: None, a word, a list, for every setting."""
    # a method that is made of another one builds it, and in tests the types of that are checked first
    for field in dataclasses.fields(methods.get(name)):
        for wrong in (None, "x", 0.5j):
            method = methods.get(name)()
            object.__setattr__(method, field.name, wrong)
            with contextlib.suppress(methods.SettingError, TypeCheckError):
                method.check()


class Largest(TorchDispatchMode):
    """The most elements of any tensor that is made, views of those given left out."""

    def __init__(self, given: list[torch.Tensor]) -> None:
        super().__init__()
        self.most, self.given = 0, {t.untyped_storage().data_ptr() for t in given}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.given:
                self.most = max(self.most, tensor.numel())
        return out


@pytest.mark.parametrize("reference", ["0", "1"])
@pytest.mark.parametrize("method", narrowest())
def test_no_tensor_of_a_decode_step_is_as_large_as_all_keys(method, stats_of, monkeypatch, reference):
    """Neither the body's keys nor its values are alive at full length: not even their codes, one in each byte.

    A page is the least that is read at a time, and scores of all query heads are.
    """
    shape = LayerShape(4, 16, torch.float32)
    cache = make(method, shape, [method.fit_layer(stats_of(shape)) if method.needs_fit else {}])
    monkeypatch.setattr(attend, "BLOCK_ELEMENTS", method.page * shape.width)
    monkeypatch.setenv("KVSHRINK_REFERENCE", reference)
    tokens = method.window + method.sinks + 40 * method.page
    feed(cache, [torch.randn(1, 4, tokens, 16)], [torch.randn(1, 4, tokens, 16)])
    keys, values = feed(cache, [torch.randn(1, 4, 1, 16)], [torch.randn(1, 4, 1, 16)])[0]
    query = torch.randn(1, 8, 1, 16)
    # once before: which kernel there is is asked once for a page, and checks of annotations then look at stored tensors
    attend.attend(query, keys, values, None, 0.25, None, keys._kvshrink)
    with Largest(cache.layers[0].body.tensors()) as seen:
        attend.attend(query, keys, values, None, 0.25, None, keys._kvshrink)
    whole = 40 * method.page * shape.width
    assert seen.most <= whole // 4


@pytest.mark.skipif(native.library() is None, reason="no C++ kernels: all attention is block by block")
def test_attention_by_the_fused_kernel_and_block_by_block_agree(method, shape, fit, monkeypatch):
    """Pads, several runs of pages, a page that was cut; one new token and three; with a soft cap and without."""
    cache = make(method, shape, [fit(method, shape)])
    d, taken = shape.head_dim, []
    rope = Rope(1e4 ** (-torch.arange(0, d, 2).float() / d), 1.0, False)
    real = torch.ones(2, 700, dtype=torch.bool)
    real[0, :30] = False

    def rows(count: int) -> list[torch.Tensor]:
        return [torch.randn(2, shape.heads, count, d)]

    for count in (600, 33, 32):
        seen = cache.get_seq_length()
        feed(cache, rows(count), rows(count), rope, real[:, seen : seen + count])
    cache.crop(-(cache.layers[0].window.count if method.policy(SOME, {}).budget is not None else 67))

    def fused(*args):
        found = real_fused(*args)
        taken.append(found is not None)
        return found

    real_fused = attend._fused
    monkeypatch.setattr(attend, "_fused", fused)
    for s in (1, 3):
        seen = cache.get_seq_length()
        keys, values = feed(cache, rows(s), rows(s), rope, real[:, seen : seen + s])[0]
        mask = torch.ones(s, seen + s, dtype=torch.bool).tril(seen) & real[:, None, None, : seen + s]
        query = torch.randn(2, 2 * shape.heads, s, d)
        for softcap in (None, 2.0):
            out = []
            for reference in ("0", "1"):
                monkeypatch.setenv("KVSHRINK_REFERENCE", reference)
                for tier in keys._kvshrink.tiers:  # which knows its kernel from one step to the next
                    vars(tier).pop("kernel", None)
                out.append(attend.attend(query, keys, values, mask, d**-0.5, softcap, keys._kvshrink))
            torch.testing.assert_close(out[0], out[1], rtol=1e-3, atol=1e-4)
    for tier in keys._kvshrink.tiers[:1]:
        key_codec, _ = tier.codecs
        readable = all(packed is not None for packed in tier.packed)
        readable &= key_codec.site == "k_post" or key_codec.expansion is not None
        assert taken[-4:] == [readable, False] * 2

"""Both halves of the connector without an engine: requests as vLLM's scheduler tells of them, a pool of junk."""

from types import SimpleNamespace as Told

import pytest
import torch

import kvshrink
from kvshrink.errors import SettingError
from kvshrink.eval.run.entries import parse
from kvshrink.serve.prefixes import PrefixStore
from kvshrink.serve.records import PageRecords
from kvshrink.serve.vllm.blocks import LayerBlocks
from kvshrink.serve.vllm.moving import Mover
from kvshrink.serve.vllm.planning import TRIES, Block, Planner

TOKENS = 32


class Backend:
    """Writes keys and values in an order of its own, as CPU backends do: channels before tokens, heads last."""

    def __init__(self, whole=True):
        self.whole = whole

    def do_kv_cache_update(self, layer, keys, values, pool, slots):
        for n, slot in enumerate(slots.tolist()):
            block, t = divmod(slot, TOKENS)
            own = pool[block].view(2, keys.shape[2], TOKENS, keys.shape[1])
            own[0, :, t], own[1, :, t] = keys[n].T, values[n].T if self.whole else 0


def blocks_of(count, heads=2, d=64, **kind):
    pool = torch.full((count, heads, TOKENS, 2 * d), 7.0)
    return LayerBlocks(Told(impl=Backend(**kind)), pool, TOKENS, heads, d, d)


def request(name, tokens, salt=b"", lora=None):
    hashes = [salt + bytes([n]) * 8 for n in range(tokens // TOKENS)]
    return Told(request_id=name, num_tokens=tokens, block_hashes=hashes, lora_request=lora)


def output(new=(), cached=(), tables=()):
    """new, cached: (name, computed, scheduled)."""
    tables = dict(tables)
    return Told(
        scheduled_new_reqs=[Told(req_id=n, num_computed_tokens=c) for n, c, _ in new],
        scheduled_cached_reqs=Told(req_ids=[n for n, *_ in cached], num_computed_tokens=[c for _, c, _ in cached]),
        num_scheduled_tokens={n: s for n, _, s in (*new, *cached)},
        kv_connector_block_state=Told(get_block_ids=tables.get),
    )


def test_blocks_come_back_from_whatever_order_a_backend_has():
    layer, draw = blocks_of(9), torch.Generator().manual_seed(0)
    keys, values = (torch.randn(2, 2, TOKENS, 64, generator=draw) for _ in range(2))
    layer.write([3, 7], keys, values)
    got = layer.read([7, 3])
    assert torch.equal(got[0], keys.flip(0))
    assert torch.equal(got[1], values.flip(0))
    assert bool((layer.pool[0] == 7).all())
    with pytest.raises(SettingError, match="does not keep each number"):
        blocks_of(9, whole=False).read([1])


def test_whole_blocks_are_saved_once_and_matched_but_for_the_last_token(tmp_path):
    store = PrefixStore(tmp_path)
    planner, one = Planner(store, "model", TOKENS), request("a", 100)
    assert planner.matched(one, 0) == 0
    table = {"a": ([5, 6, 7, 8],)}
    first = planner.step(output(new=[("a", 0, 70)], tables=table))
    assert [(b.index, b.ids) for b in first.saves] == [(0, (5,)), (1, (6,))]
    second = planner.step(output(cached=[("a", 70, 30)], tables=table))
    assert [(b.index, b.ids) for b in second.saves] == [(2, (7,))]
    for block in (*first.saves, *second.saves):
        store.put(block.key, b"x")
    assert planner.matched(request("b", 100), 0) == 96
    assert planner.matched(request("c", 96), 0) == 64, "one token at least is computed"
    assert planner.matched(request("d", 100), 64) == 32, "behind what the engine has itself"
    assert planner.matched(request("e", 100, b"salt"), 0) == 0
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.bin").write_bytes(b"weights")
    assert planner.matched(request("f", 100, lora=Told(lora_path=str(adapter))), 0) == 0
    assert planner.matched(request("j", 100, lora=Told(lora_path="some/adapter")), 0) == 0
    back = request("i", 100)
    back.num_preemptions = 1
    assert planner.matched(back, 0) == 0, "over its own tokens as they were stored"
    assert Planner(store, "another model", TOKENS).matched(request("b", 100), 0) == 0
    two = request("g", 100)
    planner.matched(two, 32)
    planner.allocated(two, ([1, 2, 3, 4],), 64)
    orders = planner.step(output())
    assert [(b.index, b.ids) for b in orders.loads["g"]] == [(1, (2,)), (2, (3,))]
    assert orders.idle
    assert not planner.step(output()).loads
    again = request("h", 100)
    for _ in range(TRIES):
        assert planner.matched(again, 0) == 96
        planner.allocated(again, ([1, 2, 3, 4],), 96)
    assert planner.matched(again, 0) == 0, "what cannot be read is not asked for without end"
    planner.finished("h")
    assert planner.matched(again, 0) == 96


def test_blocks_that_left_a_window_are_not_saved(tmp_path):
    planner, one = Planner(PrefixStore(tmp_path), "model", TOKENS), request("a", 100)
    planner.matched(one, 0)
    orders = planner.step(output(new=[("a", 0, 100)], tables={"a": ([5, 6, 7], [0, 9, 10])}))
    assert [b.index for b in orders.saves] == [1, 2]


@pytest.mark.parametrize("method", ["none", "turboquant:bits=4"])
def test_rows_go_to_files_and_back(tmp_path, method):
    model = kvshrink.reference_model("float32")[0]
    records = None if method == "none" else PageRecords.of(model, parse(method).method)
    draw, store = torch.Generator().manual_seed(0), PrefixStore(tmp_path)
    layers = {i: (i % 2, blocks_of(12)) for i in range(4)}
    keys, values = ({i: torch.randn(3, 2, TOKENS, 64, generator=draw) for i in layers} for _ in range(2))
    blocks = [Block(f"{n:064x}", n, (n + 1, n + 5)) for n in range(3)]
    for i, (group, layer) in layers.items():
        layer.write([b.ids[group] for b in blocks], keys[i], values[i])
    mover = Mover(store, layers, records, exact=1)
    mover.save(blocks)
    mover.saver.submit(int).result()
    assert all(block.key in store for block in blocks)
    for _, layer in layers.values():
        layer.pool.fill_(7.0)
    moved = [Block(b.key, b.index, (b.ids[0] + 3, 0 if b.index == 0 else b.ids[1] + 3)) for b in blocks]
    mover.load("a", moved)
    assert ended(mover) == {"a": True}
    for i, (group, layer) in layers.items():
        got = layer.read([b.ids[group] for b in moved])
        for n, block in enumerate(moved):
            if not block.ids[group]:  # out of a sliding window
                assert bool((layer.pool[0] == 7).all())
                continue
            for mine, theirs in zip(got, (keys[i], values[i]), strict=True):
                error = float((mine[n] - theirs[n]).norm() / theirs[n].norm())
                assert error == 0 if n == 0 or records is None else 0 < error < 0.2
    path = store._path(blocks[1].key)
    path.write_bytes(path.read_bytes()[:-1])
    mover.load("b", moved)
    assert ended(mover) == {"b": False}
    assert blocks[1].key not in store
    store.put(blocks[1].key, b"of another form")
    mover.load("c", moved)
    assert ended(mover) == {"c": False}
    assert blocks[1].key not in store, "or it would be met again and again"
    mover.close()


def ended(mover):
    while not (done := mover.loaded(idle=True)):
        pass
    return done


def test_what_cannot_be_kept_costs_the_engine_nothing(tmp_path, monkeypatch, caplog):
    store, layers = PrefixStore(tmp_path), {0: (0, blocks_of(4))}
    mover = Mover(store, layers, None, exact=0)
    monkeypatch.setattr("kvshrink.serve.vllm.moving.WAITING", 10)
    mover.save([Block(f"{1:064x}", 0, (1,))])
    assert mover.dropped == 1
    monkeypatch.undo()
    monkeypatch.setattr(store, "put", lambda *_: 1 / 0)
    mover.save([Block(f"{1:064x}", 0, (1,))])
    mover.close()
    assert "cannot be kept (division by zero)" in caplog.text
    assert mover.waiting == 0


def test_blocks_are_turned_where_they_are(tmp_path):
    """Of keys before RoPE, kept whole: what comes back is what was there, at any place."""
    model = kvshrink.reference_model("float32")[0]
    texts = torch.randint(10, 3000, (4, 256), generator=torch.Generator().manual_seed(1))
    fitted = kvshrink.fit(model, kvshrink.CSKV(keep=1.0, bits=None), texts, progress=False)
    draw, layers = torch.Generator().manual_seed(0), {i: (0, blocks_of(8)) for i in range(4)}
    keys, values = (torch.randn(2, 2, TOKENS, 64, generator=draw) for _ in range(2))
    records = PageRecords.of(model, fitted)
    mover = Mover(PrefixStore(tmp_path), layers, records, exact=0)
    for _, layer in layers.values():
        layer.write([1, 2], keys, values)
    mover.save([Block(f"{n:064x}", n, (1 + n // 5,)) for n in (3, 7)])
    mover.saver.submit(int).result()
    stored = mover.store.get(f"{7:064x}")
    rows = {i: (keys[1:], values[1:]) for i in layers}
    assert stored == records.pack(rows, torch.tensor([7 * TOKENS])).numpy().tobytes()
    assert stored != records.pack(rows, torch.tensor([3 * TOKENS])).numpy().tobytes()
    mover.load("a", [Block(f"{n:064x}", n, (4 + n // 5,)) for n in (3, 7)])
    assert ended(mover) == {"a": True}
    got = layers[2][1].read([4, 5])
    torch.testing.assert_close(got[0], keys, rtol=1e-3, atol=1e-3)
    mover.close()

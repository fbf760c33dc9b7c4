"""Attention over an engine's pool against attention written out over what each token is held as."""

import numpy as np
import pytest
import torch

import kvshrink
from kvshrink.cache.attend import attend, rebuild
from kvshrink.eval.run.entries import parse
from kvshrink.serve.pool import Places, PoolRows, Reading, pages_of, rows_at
from kvshrink.serve.records import PageRecords

PAGE, WINDOW, LENGTHS = 32, 32, (20, 63, 64, 65, 100, 203)
H, MEMBERS, D = 2, 2, 64


@pytest.fixture(scope="module")
def fast():
    model = kvshrink.reference_model("float32")[0]
    texts = torch.randint(10, 3000, (4, 256), generator=torch.Generator().manual_seed(1))
    spectral = kvshrink.Spectral(budget=0.2, speed="fast", allocation="energy")
    return kvshrink.fit(model, spectral, texts, progress=False)


class Engine:
    """Requests of these lengths in two pools of blocks, in no order, among junk; pages as they leave the window."""

    def __init__(self, records, lengths, size, sinks, generator):
        self.part, self.size, self.sinks = records.at(0), size, sinks
        blocks, each = 80, -(-max(lengths) // size)
        order = torch.randperm(blocks, generator=generator).numpy()
        self.codes = order[: len(lengths) * each].reshape(len(lengths), each)
        self.exact = order[::-1][: len(lengths) * each].reshape(len(lengths), each).copy()
        room = self.part.layout.size + 16
        self.pool = torch.randint(0, 255, (blocks, 1, size // PAGE, room), dtype=torch.uint8, generator=generator)
        self.rows = torch.full((blocks, H, size, 2 * D), torch.nan)
        self.keys, self.values = ([torch.randn(1, H, n, D, generator=generator) for n in lengths] for _ in range(2))
        self.lengths = lengths
        for i, n in enumerate(lengths):
            at = np.arange(n)
            both = torch.cat([self.keys[i], self.values[i]], -1)[0].transpose(0, 1)
            self.rows[self.exact[i][at // size], :, at % size] = both

    def reading(self, rows, new, before=0):
        lengths = [self.lengths[i] - before for i in rows]
        return Reading(lengths, new, self.codes[list(rows)], self.size, WINDOW, PAGE, self.sinks)

    def leave(self, reading, rows):
        places = Places(reading, self.exact[list(rows)])
        if len(reading.leaving[0]):
            keys, values = rows_at(self.rows, places.leaving, D)
            first = torch.from_numpy(reading.leaving[1] * PAGE)
            packed = self.part.pack(keys, values, first)
            block, inner = reading.leaving_records
            self.pool[block, 0, inner, : packed.shape[-1]] = packed[:, 0]

    def held(self, i, seen):
        """Keys and values of a request's tokens as they are held when it has so many before its new one."""
        keys, values = self.keys[i].clone(), self.values[i].clone()
        for n in range(int(pages_of(np.array(seen), WINDOW, PAGE))):
            at, first = slice(n * PAGE, (n + 1) * PAGE), torch.tensor([n * PAGE])
            k, v = self.part.unpack(self.part.pack(keys[:, :, at], values[:, :, at], first), first)
            own = slice(self.sinks if n == 0 else n * PAGE, (n + 1) * PAGE)
            keys[:, :, own], values[:, :, own] = k[:, :, own.start - n * PAGE :], v[:, :, own.start - n * PAGE :]
        return keys, values


def written_out(query, keys, values, new):
    """[1, q, s, d] in float64: each new token sees all up to itself."""
    keys, values = (x.double().repeat_interleave(MEMBERS, 1) for x in (keys, values))
    scores = query.double() @ keys.transpose(2, 3) * D**-0.5
    t = keys.shape[2]
    scores = scores.masked_fill(torch.ones(new, t, dtype=torch.bool).triu(t - new + 1), -torch.inf)
    return (scores.softmax(-1) @ values).float()


@pytest.mark.parametrize("name", ["turboquant:bits=4", "kivi:bits=4", "fast"])
@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("sinks", [0, 4, 32])
@pytest.mark.parametrize("reference", ["0", "1"], ids=["kernels", "reference"])
@torch.inference_mode()
def test_requests_of_any_length_decode_together(fast, name, size, sinks, reference, monkeypatch):
    """Where a request has no token or page its row has what is no number, and junk."""
    monkeypatch.setenv("KVSHRINK_REFERENCE", reference)
    model = kvshrink.reference_model("float32")[0]
    records = PageRecords.of(model, fast if name == "fast" else parse(name).method)
    draw = torch.Generator().manual_seed(0)
    engine, rows = Engine(records, LENGTHS, size, sinks, draw), range(len(LENGTHS))
    for i, n in enumerate(LENGTHS):  # each prompt but its last token in one step
        if n > 1:
            engine.leave(Reading([n - 1], n - 1, engine.codes[[i]], size, WINDOW, PAGE, sinks), [i])
    reading = engine.reading(rows, 1)
    query = torch.randn(len(LENGTHS), H * MEMBERS, 1, D, generator=draw)
    places = Places(reading, engine.exact)
    keys, values = places.rows(engine.rows, D)
    held = rows_at(engine.rows, places.sinks, D) if sinks else None
    gathered = reading.snapshot(engine.pool, engine.part, held)
    there = reading.snapshot(engine.pool, engine.part, None, PoolRows(engine.rows, places, D))
    for snapshot in (gathered, there):
        got = attend(query, keys, values, None, D**-0.5, None, snapshot)
        for i, n in enumerate(LENGTHS):
            want = written_out(query[i : i + 1], *engine.held(i, n - 1), 1)
            torch.testing.assert_close(got[i : i + 1], want, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("sinks", [0, 4])
@torch.inference_mode()
def test_a_part_of_a_prompt_reads_what_left_before_it(sinks):
    """Read as it is stored, and made dense at once."""
    model = kvshrink.reference_model("float32")[0]
    records, draw = PageRecords.of(model, parse("turboquant:bits=4").method), torch.Generator().manual_seed(0)
    engine, new = Engine(records, (203,), 32, sinks, draw), 50
    engine.leave(engine.reading([0], 203 - new, new), [0])
    reading = engine.reading([0], new)
    query = torch.randn(1, H * MEMBERS, new, D, generator=draw)
    places = Places(reading, engine.exact)
    keys, values = rows_at(engine.rows, places.exact, D)
    held = rows_at(engine.rows, places.sinks, D) if sinks else None
    snapshot = reading.snapshot(engine.pool, engine.part, held)
    want = written_out(query, *engine.held(0, 203 - new), new)
    got = attend(query, keys, values, None, D**-0.5, None, snapshot)
    torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-3)
    whole = rebuild(snapshot, keys, values)
    torch.testing.assert_close(written_out(query, *whole, new), want, rtol=2e-3, atol=2e-3)


def test_pages_follow_from_the_count_of_tokens_alone():
    assert pages_of(np.array([0, 31, 63, 64, 95, 96, 1000]), 32, 32).tolist() == [0, 0, 0, 1, 1, 2, 30]

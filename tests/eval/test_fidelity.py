"""Fidelity: what is made of the tracks of several documents, and of what is generated."""

import json

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from kvshrink import RTN, data
from kvshrink.errors import EvalError
from kvshrink.eval.run.fidelity import by_distance, common_prefix, fidelity, summary, trajectories
from kvshrink.eval.run.stats import bootstrap
from kvshrink.eval.run.teacher import Track, follow
from kvshrink.methods.evict.streaming_llm import StreamingLLM

LOSSLESS, LOSSY = RTN(bits=None), RTN(bits=2)


@pytest.fixture(scope="module")
def documents(reference):
    text, tokenizer = data.path("heldout.txt").read_text(), reference[1]
    starts = (5000, 60_000, 120_000)
    return [tokenizer(text[at : at + 2500], add_special_tokens=False)["input_ids"][:250] for at in starts]


@pytest.fixture(scope="module")
def measured(reference, documents):
    methods = {"full": None, "same": LOSSLESS, "two": LOSSY, "four": RTN(bits=4)}
    return fidelity(reference[0], methods, documents, prefix=200, mode="chunked", chunk=8, trajectory=12, n_bytes=700)


def track(kl, nll, nll_full, held=50) -> Track:
    n = len(kl)
    return Track(
        nll=np.array(nll, dtype=float),
        nll_full=np.array(nll_full, dtype=float),
        kl=np.array(kl, dtype=float),
        top1=np.ones(n),
        top5=np.full(n, 0.8),
        dp=np.array([0.3] + [0.0] * (n - 1)),
        compressed=np.array([0] + [32] * (n - 1)),
        held=held,
        full=100,
        seconds=1.0,
    )


def test_numbers_of_two_documents_by_hand():
    a, b = track([0, 1, 2, 3], [2, 2, 2, 2], [1, 1, 1, 1]), track([4, 5, 6, 107], [3, 3, 3, 5], [3, 3, 3, 3], held=70)
    paths = [np.array([True, True, False, True]), np.array([True] * 4)]
    x = summary([a, b], paths, "decode", 1, n_bytes=10)
    assert (x.documents, x.positions, x.mode, x.chunk) == (2, 8, "decode", 1)
    assert (x.kl_mean, x.kl_median, x.kl_max) == (16, 3.5, 107)
    assert (x.kl_p95, x.kl_p99, x.kl_p999) == tuple(np.percentile([0, 1, 2, 3, 4, 5, 6, 107], [95, 99, 99.9]))
    # Student's t: mean -+ 12.706 |difference| / 2; a divergence is never below 0
    assert (x.kl_low, x.kl_high) == pytest.approx((0, 16 + 12.706 * 29 / 2))
    assert (x.nll, x.nll_full, x.dnll) == (2.75, 2, 0.75)
    assert (x.dnll_low, x.dnll_high) == pytest.approx((0.75 - 12.706 / 4, 0.75 + 12.706 / 4))
    assert (x.ppl, x.ppl_full) == pytest.approx((np.exp(2.75), np.exp(2)))
    assert x.bits_per_byte == pytest.approx(22 / np.log(2) / 10)
    assert (x.top1, x.top5) == pytest.approx((1, 0.8))
    assert x.dp_rms == pytest.approx(0.3 / 2)
    assert (x.trajectory_prefix, x.trajectory_agreement, x.trajectory_tokens) == (3, 7 / 8, 4)
    assert (x.exercised, x.byte_ratio) == pytest.approx((0.75, 0.6))


def test_many_documents_are_resampled():
    rows = [track([float(i)], [float(i)], [0.0]) for i in range(30)]
    x = summary(rows, [], "decode", 1)
    assert (x.kl_low, x.kl_high) == bootstrap([float(i) for i in range(30)], 0)


def test_one_document_has_no_interval_and_a_simulation_keeps_no_bytes():
    x = summary([track([1], [1], [1], held=None)], [], "simulated", None)
    assert (x.kl_low, x.kl_high, x.dnll_low, x.dnll_high, x.byte_ratio, x.trajectory_prefix) == (None,) * 6


def test_distances_are_counted_from_the_prefix_end():
    kl = np.zeros((2, 200))
    kl[:, :32], kl[0, 32:128], kl[:, 199] = 1, 2, 72
    assert by_distance(kl) == [{"upto": 32, "kl": 1}, {"upto": 128, "kl": 1}, {"upto": 200, "kl": 1}]
    assert [x["upto"] for x in by_distance(kl[:, :32])] == [32]


@pytest.mark.parametrize(("equal", "length"), [([1, 1, 0, 1], 2), ([0, 1], 0), ([1, 1, 1], 3)])
def test_common_prefix(equal, length):
    assert common_prefix(np.array(equal, dtype=bool)) == length


def test_fewer_bits_are_less_faithful(measured):
    full, same, two, four = (measured[x] for x in ("full", "same", "two", "four"))
    assert same.kl_max < 1e-5
    assert full.kl_max == full.dnll == full.dp_rms == 0
    assert (same.top1, same.top5, same.trajectory_agreement, same.trajectory_prefix) == (1, 1, 1, 12)
    assert two.kl_mean > 4 * four.kl_mean > 0
    assert two.kl_low < two.kl_mean < two.kl_high
    assert two.top1 < 1
    assert two.top5 < four.top5 < 1
    assert two.dp_rms > four.dp_rms > 0
    assert two.byte_ratio < four.byte_ratio < 0.5 < same.byte_ratio
    assert (two.documents, two.positions, two.chunk, full.byte_ratio) == (3, 150, 8, 1)
    assert two.nll_full == four.nll_full == full.nll
    assert two.trajectory_prefix < 12


def test_the_result_is_json(measured):
    plain = json.loads(json.dumps(measured["two"].to_dict()))
    assert plain["by_distance"][0]["upto"] == 32
    assert plain["kl_mean"] == round(measured["two"].kl_mean, 6)


def test_kl_along_generated_text_is_that_of_the_same_tokens_read_one_by_one(reference, documents):
    model, _ = reference
    methods = {"full": None, "lossless": RTN(bits=None), "lossy": LOSSY}
    ids = torch.tensor([documents[0][:200]])
    found = fidelity(model, methods, documents[:1], prefix=200, mode="chunked", chunk=8, trajectory=12)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        said = model.generate(ids, past_key_values=cache, max_new_tokens=12, do_sample=False, eos_token_id=None)
    wanted = follow(model, methods, said, 200)
    assert found["lossy"].generated_kl == pytest.approx(wanted["lossy"].kl.mean(), rel=1e-3)
    assert found["lossy"].generated_kl > 100 * found["lossless"].generated_kl
    assert found["full"].generated_kl == 0
    assert found["full"].generated_growth is None
    halves = wanted["lossy"].kl[:6].mean(), wanted["lossy"].kl[6:].mean()
    assert found["lossy"].generated_growth == pytest.approx(halves[1] / halves[0], rel=1e-2)
    assert found["lossy"].generated_by_step == [{"upto": 12, "kl": found["lossy"].generated_kl}]


def test_trajectories_are_what_generate_gives(reference, documents):
    """The full cache's against transformers' own greedy generation; a window of one token soon leaves it."""
    model = reference[0]
    ids = torch.tensor([documents[0][:200]])
    with torch.inference_mode():
        given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 10, "min_new_tokens": 10}
        own = model.generate(ids, do_sample=False, pad_token_id=0, **given)[0, 200:]
    seen = []
    hook = model.lm_head.register_forward_hook(lambda m, args, out: seen.append(int(out[0, -1].argmax())))
    try:
        methods = {"same": LOSSLESS, "few": StreamingLLM(window=1, sinks=0)}
        equal = trajectories(model, methods, ids[:, :200].tolist()[0] + [0], 200, 10)
    finally:
        hook.remove()
    assert seen[1:11] == own.tolist()  # after the prefill's logits
    assert equal["same"].all()
    assert not equal["few"].all()


def test_unlike_documents_are_refused(reference, documents):
    model = reference[0]
    with pytest.raises(EvalError, match="2 documents of 240 to 250 tokens"):
        fidelity(model, {"x": LOSSY}, [documents[0], documents[1][:240]], prefix=200)
    with pytest.raises(EvalError, match="0 documents"):
        fidelity(model, {"x": LOSSY}, [], prefix=200)
    with pytest.raises(EvalError, match="nothing can be generated"):
        fidelity(model, {"x": LOSSY}, documents, prefix=200, mode="simulated", trajectory=3)
    with pytest.raises(EvalError, match="wide: no scored token read a compressed one"):
        fidelity(model, {"x": LOSSY, "wide": RTN(bits=2, window=300)}, documents, prefix=200, mode="chunked")

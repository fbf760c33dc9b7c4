"""What command lines are tried on: a model of two layers, what kvshrink made of it, and files of all wrong kinds."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from transformers import BertConfig, BertLMHeadModel, LlamaConfig, LlamaForCausalLM

from kvshrink import data
from kvshrink.reference import FOLDER

CONTEXT = 512
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
BROKEN = ("cut", "types", "index", "shard", "bare", "empty", "pickle", "holes", "deep", "sizes", "words")


def model(folder: Path) -> Path:
    """A random Llama with the bundled model's tokenizer."""
    torch.manual_seed(0)
    vocab = json.loads((FOLDER / "config.json").read_text())["vocab_size"]
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    _tokenizer(folder)
    return folder


def broken_models(good: Path, folder: Path) -> None:
    """Folders that are nearly a model; `words` is one, but no decoder."""
    for name in BROKEN:
        shutil.copytree(good, folder / name)
    weights = (good / "model.safetensors").read_bytes()
    (folder / "cut" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    _edit(folder / "types", num_hidden_layers="two", rms_norm_eps="small", rope_parameters=[1])
    (folder / "index" / "model.safetensors").unlink()
    (folder / "index" / "model.safetensors.index.json").write_text('{"weight_map": ["a"]}')
    (folder / "shard" / "model.safetensors").unlink()
    shard = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
    (folder / "shard" / "model.safetensors.index.json").write_text(json.dumps(shard))
    for name in TOKENIZER:
        (folder / "bare" / name).unlink()
    shutil.rmtree(folder / "empty")
    (folder / "empty").mkdir()
    (folder / "pickle" / "model.safetensors").unlink()
    (folder / "pickle" / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR.")
    _edit(folder / "holes", num_hidden_layers=3)
    (folder / "deep" / "config.json").write_text("[" * 100_000)
    _edit(folder / "sizes", vocab_size=100)
    shutil.rmtree(folder / "words")
    vocab = json.loads((good / "config.json").read_text())["vocab_size"]
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertLMHeadModel(BertConfig(vocab_size=vocab, **sizes)).save_pretrained(folder / "words")
    _tokenizer(folder / "words")


def texts(folder: Path) -> None:
    folder.mkdir()
    book = data.path("heldout.txt").read_text(encoding="utf-8")
    (folder / "good.txt").write_text(book[:16_000], encoding="utf-8")
    (folder / "prompt.txt").write_text(book[:300], encoding="utf-8")
    (folder / "short.txt").write_text("Two words.")
    (folder / "long.txt").write_text(book[:20_000], encoding="utf-8")
    (folder / "bracket[0].txt").write_text(book[:16_000], encoding="utf-8")
    (folder / "mark.txt").write_text(book[:16_000], encoding="utf-8-sig")
    (folder / "latin.txt").write_text("caf\xe9 " * 2000, encoding="latin-1")
    (folder / "wide.txt").write_text(book[:9000], encoding="utf-16")
    (folder / "wide_bare.txt").write_text("abc " * 900, encoding="utf-16-le")
    (folder / "binary").write_bytes(bytes(range(256)) * 50)
    (folder / "empty.txt").write_text("")
    (folder / "blank.txt").write_text(" \n\t\n" * 50)
    (folder / "rows.jsonl").write_text('{"input": 3, "context": [], "answers": null, "length": "x"}\n[]\n')
    row = {f"choice_{x}": 1 for x in "ABCD"} | dict.fromkeys(
        ("question", "context", "answer", "domain", "difficulty", "length")
    )
    (folder / "choices.jsonl").write_text(json.dumps(row))
    (folder / "deep.json").write_text("[" * 50_000)
    (folder / "page.md").write_text("A page without marks.\n")
    os.mkfifo(folder / "pipe")


def snapshot(folder: Path) -> dict[str, str]:
    """What is in every file, and where every link goes."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "other"
    return found


def _tokenizer(folder: Path) -> None:
    for name in TOKENIZER:
        shutil.copy(FOLDER / name, folder / name)


def _edit(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))

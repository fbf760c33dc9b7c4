"""How many channels the K and V projections really use: what a low-rank cache can hope for on this model.

    python -m recipes.reference_model.spectra --run runs/reference

Over held-out books and retrieval documents, per layer: channels (all KV heads together) that hold 90, 95, 99 and
99.9 % of the energy, the sum of squared singular values, not centred. K before RoPE is what a low-rank K projection has
to reproduce; RoPE then turns it and spreads the energy. Prints one JSON object.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from recipes.reference_model import tasks
from recipes.reference_model.batches import Encoder
from recipes.reference_model.corpus import Corpus
from recipes.reference_model.recipe import HEAD_DIM

SHARES = (0.9, 0.95, 0.99, 0.999)
TEXTS = {"book": ["book"], "lines": ["lines"], "all": ["book", "lines", "needles", "haystack", "jsonkv", "variables"]}


def channels(x: Float[Tensor, "t c"]) -> dict[str, int]:
    """{share of the energy: channels that hold it, in the best basis}."""
    values = torch.linalg.eigvalsh(x.double().T @ x.double()).flip(0).clamp_min(0)
    energy = values.cumsum(0) / values.sum()
    return {f"{100 * s:g}%": int((energy < s).sum()) + 1 for s in SHARES}


@torch.no_grad()
def projections(model: LlamaForCausalLM, documents: list[Int[Tensor, " t"]]) -> dict[str, Float[Tensor, "t c"]]:
    """K before RoPE, K after RoPE and V of every layer, all documents one after the other."""
    parts: dict[str, list[Tensor]] = {}
    hooks = []
    for i, layer in enumerate(model.model.layers):
        for name in ("k", "v"):
            keep = parts.setdefault(f"{i}.{name}", [])
            projection = getattr(layer.self_attn, f"{name}_proj")
            hooks.append(projection.register_forward_hook(lambda _, __, out, keep=keep: keep.append(out[0])))
    try:
        for ids in documents:
            model.model(ids[None], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    for i in range(len(model.model.layers)):
        parts[f"{i}.k after RoPE"] = [_turned(model, k) for k in parts[f"{i}.k"]]
    return {name: torch.cat(p) for name, p in parts.items()}


def _turned(model: LlamaForCausalLM, k: Float[Tensor, "t c"]) -> Float[Tensor, "t c"]:
    cos, sin = model.model.rotary_emb(k, torch.arange(len(k))[None])
    heads = k.unflatten(-1, (-1, HEAD_DIM)).transpose(0, 1)[None]
    return apply_rotary_pos_emb(heads, heads, cos, sin)[1][0].transpose(0, 1).flatten(1)


def measure(model: LlamaForCausalLM, encoder: Encoder, corpus: Corpus, length: int, documents: int) -> dict:
    report, world = {}, corpus.held_out_world(random.Random(5))
    for name, kinds in TEXTS.items():
        texts = [tasks.TASKS[kind](world, length) for _ in range(documents) for kind in kinds]
        ids = [torch.tensor(encoder(ex, close=False)[0][:length]) for ex in texts]
        report[name] = {site: channels(x) for site, x in sorted(projections(model, ids).items())}
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description="Singular-value spectra of K and V of a finished run, as JSON.")
    parser.add_argument("--run", required=True, type=Path, help="the --out folder of the recipe")
    parser.add_argument("--length", type=int, default=2048, help="tokens per document")
    parser.add_argument("--documents", type=int, default=4, help="documents of each kind")
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.run / "model", dtype=torch.float32).eval()
    encoder = Encoder(AutoTokenizer.from_pretrained(args.run / "model"))
    corpus = Corpus.load(args.run / "corpus.json")
    print(json.dumps(measure(model, encoder, corpus, args.length, args.documents)))


if __name__ == "__main__":
    main()

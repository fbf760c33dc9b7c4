"""The model types that are used most: what a cache of ours does on each, beside DynamicCache.

    python bench/most_used.py --out bench/results/most_used.json

Tiny random models (tiny_models.py), float32 but where it says bfloat16. Lossless: whether the tokens are the same, of
prompts left-padded, with three beams, in three parts, over two turns, saved and loaded. KL: of 40 tokens behind 200,
in nats, of a random model, so it says that nothing is broken and not what a trained one loses. "disk": spectral
fitted from a folder, a layer at a time, by energies, beside the same in memory.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_models import build
from tqdm import tqdm
from transformers import DynamicCache

import kvshrink
from kvshrink import RTN, Spectral, fit
from kvshrink.errors import KVShrinkError
from kvshrink.methods.quant.turboquant import TurboQuant
from kvshrink.store import files

TYPES = (
    "gpt_oss", "qwen3_5_text", "qwen3_next", "gemma4_text", "llama4_text", "nemotron_h", "lfm2", "falcon_h1", "exaone4",
    "ernie4_5", "deepseek_v3", "glm4_moe_lite", "phi3", "qwen3_moe",
)  # fmt: skip
LOSSLESS = RTN(bits=None, window=8)


def ids_of(b: int, s: int, seed: int = 7) -> torch.Tensor:
    return torch.randint(3, 110, (b, s), generator=torch.Generator().manual_seed(seed))


def answered(model: Any, cache: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, **settings: Any) -> Any:
    mask = torch.ones_like(ids) if mask is None else mask
    given = {} if cache is None else {"past_key_values": cache}
    return model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False, **given, **settings)


def lossless(model: Any, folder: Path) -> dict[str, bool]:
    """{use: whether the tokens are DynamicCache's}."""
    ids, mask = ids_of(2, 120), torch.ones(2, 120, dtype=torch.long)
    mask[1, :31] = 0

    def fresh() -> Any:
        return kvshrink.make_cache(model, LOSSLESS)

    found = {"left pads": answered(model, fresh(), ids, mask).equal(answered(model, None, ids, mask))}
    one = ids[:1]
    found["beams"] = answered(model, fresh(), one, num_beams=3).equal(answered(model, None, one, num_beams=3))
    turns = []
    for cache in (fresh(), DynamicCache(config=model.config)):
        with torch.no_grad():
            for at in range(0, 90, 30):
                model(one[:, at : at + 30], past_key_values=cache)
        first = answered(model, cache, one)
        turns.append((first, answered(model, cache, torch.cat([first, ids_of(1, 30)], 1)), cache))
    found["in parts"], found["second turn"] = (turns[0][i].equal(turns[1][i]) for i in range(2))
    turns[0][2].save(folder / "cache.safetensors")
    loaded = fresh().load(folder / "cache.safetensors")
    last = torch.cat([turns[0][1], ids_of(1, 5, 3)], 1)
    found["saved and loaded"] = answered(model, loaded, last).equal(answered(model, turns[1][2], last))
    return found


def kl_of(model: Any, cache: Any) -> float:
    ids, full = ids_of(1, 240), DynamicCache(config=model.config)
    with torch.no_grad():
        for c in (full, cache):
            model(ids[:, :200], past_key_values=c)
        wanted, got = (model(ids[:, 200:], past_key_values=c).logits.float().log_softmax(-1) for c in (full, cache))
    return float(f"{float((wanted.exp() * (wanted - got)).sum(-1).mean()):.2e}")


def fitted(model: Any, folder: Path, rows: torch.Tensor) -> dict[str, Any]:
    """KL of spectral at half of the body's bytes, fitted in memory and from disk."""
    out: dict[str, Any] = {}
    try:
        method = Spectral(budget=0.5, window=8)
        out["spectral"] = kl_of(model, kvshrink.make_cache(model, fit(model, method, rows, progress=False)))
        energies = Spectral(budget=0.5, window=8, allocation="energy")
        model.save_pretrained(folder / "model")
        for name, source in (("memory", model), ("disk", folder / "model")):
            artifact = fit(source, energies, rows, progress=False)
            out[f"spectral, energies, {name}"] = kl_of(model, kvshrink.make_cache(model, artifact))
    except KVShrinkError as error:
        out["spectral refused"] = str(error).replace(str(folder), "FOLDER")
    return out


def row(name: str) -> dict[str, Any]:
    model, rows = build("text", name), ids_of(16, 256, 1)
    with tempfile.TemporaryDirectory() as place:
        found: dict[str, Any] = {"type": name, "lossless": lossless(model, Path(place))}
        found["kl"] = {
            "rtn, 4 bits": kl_of(model, kvshrink.make_cache(model, RTN(bits=4, window=8))),
            "turboquant, 4 bits": kl_of(model, kvshrink.make_cache(model, TurboQuant(bits=4, window=8))),
            **fitted(model, Path(place), rows),
        }
    half = build("text", name).to(torch.bfloat16)
    ids = ids_of(1, 120)
    found["bfloat16, same tokens"] = answered(half, kvshrink.make_cache(half, LOSSLESS), ids).equal(
        answered(half, None, ids)
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results/most_used.json"))
    parser.add_argument("--only", default="", help="types, with commas between them")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    names = [n for n in TYPES if not args.only or n in args.only.split(",")]
    rows = [row(name) for name in tqdm(names, unit="type")]
    command = "python bench/most_used.py"
    files.write_json(args.out, {"command": command, "transformers": transformers.__version__, "rows": rows})
    for found in rows:
        print(found["type"], all(found["lossless"].values()), found["bfloat16, same tokens"], found["kl"])


if __name__ == "__main__":
    main()

"""Weights that another library has quantised, under a cache of ours: the bundled model, in bfloat16.

    bench/peers/make.sh hqq torchao
    bench/peers/hqq-torchao/venv/bin/python bench/weights.py --out bench/results/weights.json

same_tokens: whether a lossless cache gives DynamicCache's. spectral_*_of_full: share of the full cache's bytes that
spectral holds, fitted from the quantised model by energies and by KL.
"""

import argparse
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import kvshrink
from kvshrink import RTN, Spectral, fit
from kvshrink.cli._common import load
from kvshrink.store import files


def quantised(library: str, model: Any) -> Any:
    model = model.to(torch.bfloat16)
    if library == "hqq":
        from hqq.core.quantize import BaseQuantizeConfig
        from hqq.models.hf.base import AutoHQQHFModel

        form = BaseQuantizeConfig(nbits=4, group_size=64)
        AutoHQQHFModel.quantize_model(model, quant_config=form, compute_dtype=torch.bfloat16, device="cpu")
    else:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(model, Int8WeightOnlyConfig())
    return model


def row(library: str) -> dict[str, Any]:
    model, tokenizer = load("reference")
    model = quantised(library, model)
    ids = tokenizer("the quick brown fox " * 40, return_tensors="pt")["input_ids"][:, :200]

    def answered(cache: Any) -> torch.Tensor:
        given = {} if cache is None else {"past_key_values": cache}
        mask = torch.ones_like(ids)
        return model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False, **given)

    found: dict[str, Any] = {"library": library, "version": version(library)}
    lossless = kvshrink.make_cache(model, RTN(bits=None, window=8))
    found["same_tokens"] = answered(lossless).equal(answered(None))
    rows = torch.randint(3, 200, (8, 256), generator=torch.Generator().manual_seed(0))
    for allocation in ("energy", "kl"):
        cache = kvshrink.make_cache(
            model, fit(model, Spectral(budget=0.3, allocation=allocation), rows, progress=False)
        )
        answered(cache)
        found[f"spectral_{allocation}_of_full"] = round(cache.report().byte_ratio, 4)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results/weights.json"))
    args = parser.parse_args()
    rows = [row(library) for library in ("hqq", "torchao")]
    files.write_json(args.out, {"command": "python bench/weights.py", "rows": rows})
    for found in rows:
        print(found)


if __name__ == "__main__":
    main()

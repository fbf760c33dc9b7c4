"""Weights that another library has quantised, under a cache of ours: the bundled model, in bfloat16.

    bench/peers/make.sh quanto hqq torchao bitsandbytes compressed-tensors
    bench/peers/quanto-hqq-torchao-bitsandbytes-compressed-tensors/venv/bin/python bench/weights.py

same_tokens: whether a lossless cache gives DynamicCache's. spectral_*_of_full: share of the full cache's bytes that
spectral holds, fitted from the quantised model by energies and by KL.
"""

import argparse
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import kvshrink
from kvshrink import RTN, Spectral, fit
from kvshrink.cli._common import load
from kvshrink.errors import KVShrinkError
from kvshrink.store import files


def hqq_4(model: Any) -> Any:
    from hqq.core.quantize import BaseQuantizeConfig
    from hqq.models.hf.base import AutoHQQHFModel

    form = BaseQuantizeConfig(nbits=4, group_size=64)
    AutoHQQHFModel.quantize_model(model, quant_config=form, compute_dtype=torch.bfloat16, device="cpu")
    return model


def torchao_8(model: Any) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())
    return model


def quanto_8(model: Any) -> Any:
    from optimum.quanto import freeze, qint8, quantize

    quantize(model, weights=qint8)
    freeze(model)
    return model


def bitsandbytes_4(model: Any) -> Any:
    return _loaded(model, BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16))


def packed_4(model: Any) -> Any:
    """GPTQ's and AWQ's layout: 4-bit codes, eight in an int32, a scale for each group of 64."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    form = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}
    config = {"quant_method": "compressed-tensors", "quantization_status": "frozen", "format": "pack-quantized"}
    groups = {"group_0": {"targets": ["Linear"], "weights": form}}
    given = QuantizationConfig(config_groups=groups, ignore=["lm_head"], **config)
    apply_quantization_config(model, given)
    for module in model.modules():
        if (scale := getattr(module, "weight_scale", None)) is not None:
            scale.data.copy_(module.weight.detach().unflatten(1, (-1, 64)).abs().amax(2) / 7)
    packer = ModelCompressor(quantization_config=given)
    packer.compress_model(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        packer.update_config(folder)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cpu")


def _loaded(model: Any, config: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        given = {"quantization_config": config, "dtype": torch.bfloat16, "device_map": "cpu"}
        return AutoModelForCausalLM.from_pretrained(folder, **given)


WAYS: dict[str, Callable[[Any], Any]] = {
    "hqq": hqq_4,
    "torchao": torchao_8,
    "optimum-quanto": quanto_8,
    "bitsandbytes": bitsandbytes_4,
    "compressed-tensors": packed_4,
}


def row(library: str) -> dict[str, Any]:
    model, tokenizer = load("reference")
    model = WAYS[library](model.to(torch.bfloat16))
    ids = tokenizer("the quick brown fox " * 40, return_tensors="pt")["input_ids"][:, :200]

    def answered(cache: Any) -> torch.Tensor:
        given = {} if cache is None else {"past_key_values": cache}
        mask = torch.ones_like(ids)
        return model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False, **given)

    name = WAYS[library].__name__
    found: dict[str, Any] = {"library": library, "version": version(library), "bits": int(name.rpartition("_")[2])}
    lossless = kvshrink.make_cache(model, RTN(bits=None, window=8))
    found["same_tokens"] = answered(lossless).equal(answered(None))
    rows = torch.randint(3, 200, (8, 256), generator=torch.Generator().manual_seed(0))
    for allocation in ("energy", "kl"):
        try:
            artifact = fit(model, Spectral(budget=0.3, allocation=allocation), rows, progress=False)
        except KVShrinkError as error:
            found[f"spectral_{allocation}_refused"] = str(error)
            continue
        cache = kvshrink.make_cache(model, artifact)
        answered(cache)
        found[f"spectral_{allocation}_of_full"] = round(cache.report().byte_ratio, 4)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results/weights.json"))
    args = parser.parse_args()
    rows = []
    for library in WAYS:
        rows.append(row(library))
        print(rows[-1])
    files.write_json(args.out, {"command": "python bench/weights.py", "rows": rows})


if __name__ == "__main__":
    main()

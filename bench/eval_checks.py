"""Two checks of the evaluation itself: how often intervals over few documents hold, and the noise floor of KL in bf16.

    python bench/eval_checks.py        # a minute; writes bench/results/eval_checks.json

Coverage: share of 2,000 draws of 4 normal or skewed (lognormal, sigma .5) values whose interval holds the true mean.
Noise floor: mean KL of a lossless cache (RTN, bits=None) from the full one, 4 held-out texts of 1,000 tokens, decode.
"""

from math import exp
from pathlib import Path

import numpy as np

from kvshrink import RTN, reference_model
from kvshrink.eval.run.fidelity import fidelity
from kvshrink.eval.run.measure import held_out
from kvshrink.eval.run.stats import bootstrap, student
from kvshrink.store import files

OUT = Path(__file__).parent / "results" / "eval_checks.json"


def coverage(draw, mean: float, draws: int = 2000, n: int = 4) -> dict:
    rng = np.random.default_rng(0)
    rows = [draw(rng, n).tolist() for _ in range(draws)]
    kinds = {"bootstrap": lambda v: bootstrap(v, 0, 400), "student": student}
    return {k: sum(low <= mean <= high for low, high in map(f, rows)) / draws for k, f in kinds.items()}


def floor(dtype: str) -> float:
    model, tokenizer = reference_model(dtype)
    texts = held_out(tokenizer, 1000, 4, 0)
    return fidelity(model, {"lossless": RTN(bits=None)}, texts, prefix=936)["lossless"].kl_mean


def main() -> None:
    data = {
        "command": "python bench/eval_checks.py",
        "coverage of 4 values": {
            "normal": coverage(lambda rng, n: rng.normal(size=n), 0.0),
            "lognormal": coverage(lambda rng, n: rng.lognormal(0, 0.5, n), exp(0.125)),
        },
        "mean KL of a lossless cache": {dtype: floor(dtype) for dtype in ("bfloat16", "float32")},
    }
    files.write_json(OUT, data)
    print(data)


if __name__ == "__main__":
    main()

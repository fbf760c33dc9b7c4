"""CSKV's latents as every quantiser stores them, at equal real bytes: which composition is the best.

    python bench/compositions.py      # writes docs/results/compositions.json, .md and .png

The bundled reference model, contexts of 4,096 tokens. Each composition's `keep` is the largest under a budget, all
bytes counted; `spectral`, CSKV's own axes and StreamingLLM stand beside them. All are compared in KL on few prompts,
then the best of each budget on more, with answers. Sides are measured as in bench/quantisers.py. Run again to resume.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from plot_quantisers import front_picture, table
from quantisers import measure, summary
from rivals import Contender, full_contender, ours
from series import TASKS
from tqdm import tqdm

from kvshrink import CSKV, Spectral, methods, reference_model
from kvshrink.attach.budget import at_byte_ratio
from kvshrink.eval.run import calibration
from kvshrink.eval.run.entries import Entry
from kvshrink.eval.run.fitting import fitted
from kvshrink.methods._quantiser import Quantiser
from kvshrink.store import files
from kvshrink.store.log import Log

LENGTH = 4096
BUDGETS = (0.0625, 0.04)
BITS = (4, 3, 2, 1.5, 1)
FEW, MANY = (1, 3), (8, 8)  # (cases of each task, documents)
BEST = 8  # compositions of a budget that are measured on many


def series() -> dict[str, Any]:
    """Label to method."""
    found: dict[str, Any] = {"spectral": Spectral(), "streaming_llm": methods.build("streaming_llm", {})}
    found |= {f"cskv int{bits}": CSKV(bits=bits) for bits in (4, 3, 2)}
    for name in methods.names():
        cls = methods.get(name)
        if not (issubclass(cls, Quantiser) and cls.of_latents):
            continue
        offered = []
        for bits in BITS:
            try:
                offered.append((f"cskv {name} {bits:g}", CSKV(bits=bits, codec=name)))
            except (methods.SettingError, TypeError):
                continue
        found |= dict(offered or [(f"cskv {name}", CSKV(codec=name))])
    return found


def plan(model: Any) -> list[Entry]:
    out = []
    for label, method in series().items():
        for budget in BUDGETS:
            at = at_byte_ratio(method, budget, model, LENGTH)
            if at.reached:
                setting = f"{method.budget_setting}={getattr(at.method, str(method.budget_setting)):.4g}"
                out.append(Entry(f"{label} @{100 * budget:g}", at.method, series=label, target=budget, setting=setting))
    return out


def best(rows: list[dict], entries: list[Entry]) -> list[str]:
    """Labels of the compositions of each budget with the least sum of KLs, and of what they are compared with."""
    target = {e.label: e.target for e in entries}
    found = []
    for budget in BUDGETS:
        at = sorted(
            (r for r in rows if target.get(r["label"]) == budget), key=lambda r: r["kl_text"] + r["kl_retrieval"]
        )
        found += [r["label"] for r in at[:BEST]]
        found += [f"{name} @{100 * budget:g}" for name in ("spectral", "cskv int4", "streaming_llm")]
    return found


def _sizes(cases: int, documents: int) -> argparse.Namespace:
    """What `measure` asks of its command line."""
    given = {"model": "reference", "tasks": TASKS, "length": LENGTH, "kl_only": False}
    return argparse.Namespace(**given, cases=cases, documents=documents)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--work", type=Path, default=Path("compositions"), help="answers and artifacts, to resume from")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = reference_model()
    entries = fitted(plan(model), model, tokenizer, calibration.texts(None), args.work / "artifacts")
    contenders: list[Contender] = [
        ours(model, e.label, f"{e.target:g}", e.method) for e in tqdm(entries, desc="contenders")
    ]
    few = Log(args.work / "few.jsonl")
    screened = summary(contenders, few, measure(model, tokenizer, contenders, few, _sizes(*FEW)))
    chosen = set(best(screened, entries))
    finals = [full_contender(), *(s for s in contenders if s.label in chosen)]
    many = Log(args.work / "many.jsonl")
    rows = summary(finals, many, measure(model, tokenizer, finals, many, _sizes(*MANY)))
    settings = {e.label: e.setting for e in entries}
    for row in (*rows, *screened):
        row["setting"] = settings.get(row["label"], "")
    found: dict[str, Any] = {"command": "python bench/compositions.py", "model": "reference, bfloat16"}
    found |= {"tokens": LENGTH, "tasks": TASKS, "few": FEW, "many": MANY, "rows": rows, "screened": screened}
    files.write_json(args.out / "compositions.json", found)
    by_budget = {budget: [r for r in rows if r["group"] == f"{budget:g}"] for budget in BUDGETS}
    parts = [f"{100 * budget:g} % of the bytes\n\n{table(group)}" for budget, group in by_budget.items()]
    (args.out / "compositions.md").write_text("\n".join(parts))
    front_picture(screened, args.out / "compositions.png")


if __name__ == "__main__":
    main()

"""What the metric of the closed form changes: KL at equal ranks, so at equal bytes, with plain and weighted errors.

    python bench/metrics.py --out docs/results/metrics.json

CSKV, 16-bit latents, so that nothing but the basis differs. KL over the last 128 tokens of held-out text, 32 a forward,
and over question and answer of retrieval prompts (context before question), each beside the plain metric on the same
documents. Contexts of 4,096 tokens, float32.
"""

import argparse
from pathlib import Path

import torch
from equal_bytes import SCORED, beside, compared, summary
from series import DIVERGED, TASKS

from kvshrink import CSKV, reference_model
from kvshrink.attach.identity import model_key
from kvshrink.eval.run import calibration
from kvshrink.eval.run.catalogue import choices, gather
from kvshrink.eval.run.entries import Entry
from kvshrink.eval.run.fitting import fitted
from kvshrink.eval.run.measure import held_out
from kvshrink.eval.run.prompt import encode
from kvshrink.store import files
from kvshrink.store.log import Log

KEEPS = (0.5, 0.35, 0.2, 0.1)
LENGTH = 4096
METRICS = {
    "plain": {},
    "query": {"key_metric": "query"},
    "output": {"value_metric": "output"},
    "query + output": {"key_metric": "query", "value_metric": "output"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/results/metrics.json"))
    parser.add_argument("--documents", type=int, default=24)
    args = parser.parse_args()
    model, tokenizer = reference_model("float32")
    entries = [Entry(f"{n} @{k:g}", CSKV(keep=k, **m), series=n, target=k) for k in KEEPS for n, m in METRICS.items()]
    ready = fitted(entries, model, tokenizer, calibration.texts(None))
    samples, _ = gather(choices(TASKS), [LENGTH], DIVERGED, 1, tokenizer, True)
    asked = []
    for sample in (s for task in samples for s in task.samples):
        context, question = encode(sample, tokenizer)
        answer = tokenizer(sample.answers[0], add_special_tokens=False)["input_ids"]
        asked.append((torch.tensor([context + question + answer]), len(context)))
    book = [(ids, LENGTH - SCORED) for ids in held_out(tokenizer, LENGTH, args.documents, 0)]
    identity, rows = model_key(model), []
    text = compared(model, ready, book, 32, Log(None), identity)
    retrieval = compared(model, ready, asked, None, Log(None), identity)
    for e in ready:
        base = f"plain @{e.target:g}"
        row = {"keep": e.target, "metric": e.series}
        for name, found in (("text", text), ("retrieval", retrieval)):
            row[name] = summary(found[e.label]) | {"beside_plain": beside(found[e.label], found[base])}
        rows.append(row)
        print(row, flush=True)
    where = {"model": "reference, float32", "tokens": LENGTH, "documents": len(book), "prompts": len(asked)}
    files.write_json(args.out, {"command": "python bench/metrics.py", **where, "rows": rows})


if __name__ == "__main__":
    main()

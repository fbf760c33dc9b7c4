"""Retrieval accuracy beside measured bytes: the table and the plot of the README.

    python bench/accuracy.py --out docs/results        # about 40 minutes on 2 cores; run again to resume

The context is compressed before the question is seen. One pass over the default calibration text fits all methods.
A StreamingLLM row holds the bytes of the row that it names, sample by sample, to within 3 % and rounded in its favour.
"""

import argparse
from pathlib import Path

from kvshrink import reference_model
from kvshrink.cli.evaluate import fitted
from kvshrink.eval import plots, tasks
from kvshrink.eval.entries import parse
from kvshrink.eval.runner import Runner
from kvshrink.eval.summary import markdown, summarise
from kvshrink.store import files

CSKV = ("keep=0.5", "keep=0.3", "keep=0.2", "keep=0.5,bits=4", "keep=0.3,bits=4", "keep=0.2,bits=4")
SPECS = (
    "full",
    *(f"cskv:{s}" for s in CSKV),
    "cskv:keep=0.2,bits=4,key_share=auto",
    *(f"streaming_llm:like=cskv {s.replace(',', ' ')}" for s in CSKV),
    "rtn:bits=4",
    "cskv:keep=0.3125",  # exactly the bytes of rtn bits=4
    "rtn:bits=2",
    "cskv:keep=0.1875",  # exactly the bytes of rtn bits=2
)
TASKS = {
    "LongEval official, 30 lines": ("longeval", {}),
    "LongEval generated, 30 lines": ("longeval", {"official": False}),
    "LongEval official, 200 lines": ("longeval", {"lines": None}),
    "passkey, 4k tokens": ("passkey", {}),
    "needle, 4k tokens": ("needle", {}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--cases", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model, tokenizer = reference_model()
    entries = fitted([parse(spec) for spec in SPECS], model, tokenizer, None)
    runner = Runner(model, tokenizer, entries)
    outcomes = []
    for title, (task, settings) in TASKS.items():
        samples = tasks.get(task).samples(args.cases, args.seed, **settings)
        outcomes += runner.run(task, samples, title, args.out / "accuracy.jsonl")
    lines = summarise(outcomes)
    record = {"command": "python bench/accuracy.py", "model": "reference", "cases": args.cases, "seed": args.seed}
    files.write_json(args.out / "accuracy.json", {**record, "results": [line.to_dict() for line in lines]})
    plots.accuracy(lines, args.out / "accuracy.png")
    print(markdown(lines))


if __name__ == "__main__":
    main()

"""Tokens x bits x ranks at equal real bytes: token methods, quantisers, spectral, and what joins them.

    python bench/tokens.py --model smollm2 --out docs/results/smollm2 [--seen]

Every byte counts (codes, scales, window, sinks, positions, which tokens are held). KL over the last 128 tokens of
held-out book text and over questions with their answers, whose contexts are compressed before the question is seen, and
answers to these, as in bench/equal_bytes.py. Each entry's free setting, the share of tokens or the budget, is the
largest under the target. Run again to resume.
"""

import argparse
import sys
from pathlib import Path

import equal_bytes
import torch
from series import REAL_TASKS
from timing import setting
from tqdm import tqdm

from kvshrink.attach.budget import at_byte_ratio
from kvshrink.cli._common import load
from kvshrink.eval.run import calibration
from kvshrink.eval.run.entries import Entry, parse
from kvshrink.fit.job import fit_all
from kvshrink.methods._roles import Method
from kvshrink.methods.artifact import Artifact
from kvshrink.methods.evict.compose import Compose
from kvshrink.methods.lowrank.spectral import Spectral
from kvshrink.store import files
from kvshrink.store.log import Log

STORE = "spectral:budget={},speed=balanced"
EVEN = "kvzip:per=even,bits=8"
TRIED = {
    0.25: (
        *("spectral:speed=balanced", "turboquant:bits=3", "kvzip", "snapkv", "expected_attention:floor=0.2"),
        *("kvzip + turboquant:bits=4", f"kvzip + {STORE.format(0.2349)}"),
        f"{EVEN} + {STORE.format(0.1079)},demote=True",
        *("attention_matching", "attention_matching + turboquant:bits=4"),
    ),
    0.125: (
        *("spectral:speed=balanced", "tcq:bits=2", "kvzip", "snapkv", "expected_attention:floor=0.2"),
        *("kvzip + turboquant:bits=4", "kvzip + turboquant:bits=2", f"kvzip + {STORE.format(0.2349)}"),
        *(f"{EVEN} + {STORE.format(b)},demote=True" for b in (0.0443, 0.0784)),
        *(f"{name} + {STORE.format(0.0443)},demote=True" for name in ("kvzip:bits=8", "snapkv:bits=8")),
        *("attention_matching", "attention_matching + turboquant:bits=4"),
        f"attention_matching + {STORE.format(0.2349)}",
    ),
    0.0625: (
        *("spectral:speed=balanced", "kvzip:window_bits=8", "kvzip:window_bits=8 + turboquant:bits=4"),
        *(f"kvzip + {STORE.format(b)}" for b in (0.1079, 0.2349)),
        *(f"{EVEN} + {STORE.format(b)},demote=True" for b in (0.0215, 0.0329)),
        *("attention_matching:window_bits=8", "attention_matching:window_bits=8 + turboquant:bits=4"),
    ),
    0.03: (
        *("spectral:speed=balanced", "streaming_llm:window_bits=8", "kvzip:bits=8,window_bits=8"),
        *(
            "kvzip:window_bits=8 + turboquant:bits=4",
            f"kvzip + {STORE.format(0.0443)}",
            f"kvzip + {STORE.format(0.1079)}",
            "attention_matching:window_bits=8 + turboquant:bits=4",
        ),
    ),
}

# worse in KL than another one of their kind at every budget: answers, which take most of the time, are not asked
LEFT_OUT = (
    *("expected_attention:floor=0.2", "kvzip + turboquant:bits=2", f"kvzip + {STORE.format(0.2349)}"),
    *(f"{name} + {STORE.format(0.0443)},demote=True" for name in (EVEN, "kvzip:bits=8", "snapkv:bits=8")),
    f"{EVEN} + {STORE.format(0.0215)},demote=True",
)


def entries(model, length: int) -> list[Entry]:
    found = []
    for target, texts in TRIED.items():
        for text in texts:
            method = parse(text).method
            assert isinstance(method, Method)
            reached = at_byte_ratio(method, target, model, length)
            free = f"{reached.method.budget_setting}={reached.method.settings()[reached.method.budget_setting]}"
            label = f"{text} @{target}"
            found.append(
                Entry(label, reached.method, series=text, target=target, reached=reached.reached, setting=free)
            )
    return found


def fitted(model, tokenizer, every: list[Entry], folder: Path) -> list[Entry]:
    """With artifacts: a composition has the tensors of its store."""
    stores = {e.method.storage if isinstance(e.method, Compose) else e.method for e in every}
    wanted = sorted({m for m in stores if isinstance(m, Spectral)}, key=lambda m: m.budget)
    missing = [m for m in wanted if not (folder / f"spectral-{m.budget}").exists()]
    if missing:
        made = fit_all(model, missing, calibration.texts(None), tokenizer, batch=4)
        for method, artifact in zip(missing, made, strict=True):
            artifact.save_pretrained(folder / f"spectral-{method.budget}")
    known = {m: Artifact.from_pretrained(folder / f"spectral-{m.budget}") for m in wanted}
    found = []
    for e in every:
        store = e.method.storage if isinstance(e.method, Compose) else e.method
        own = known.get(store)
        ready = e.method if own is None else Artifact(e.method, own.layers, own.model, own.provenance)
        found.append(Entry(e.label, ready, series=e.series, target=e.target, reached=e.reached, setting=e.setting))
    return found


def page(rows: list[dict]) -> str:
    lines = ["| target | method | bytes held | KL, text | KL, question and answer | right |", "| --- " * 6 + "|"]
    for r in rows:
        cells = [f"{r['target']:g}" if r["target"] else "", f"`{r['series']}`", f"{100 * r['byte_ratio']:.1f} %"]
        for part in ("text", "retrieval"):
            cells.append(f"{r[part]['kl']:.4f} ({r[part]['kl_low']:.3f}-{r[part]['kl_high']:.3f})" if part in r else "")
        cells.append(f"{r['score']:.2f}" if "score" in r else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--cases", type=int, default=4)
    parser.add_argument("--diverged", type=int, default=3)
    parser.add_argument("--seen", action="store_true", help="the question is compressed with its context")
    parser.add_argument("--kl-only", action="store_true", help="without answers, which take most of the time")
    parser.add_argument("--out", type=Path, default=Path("docs/results/smollm2"))
    args = parser.parse_args()
    model, tokenizer = load(args.model)
    every = fitted(model, tokenizer, entries(model, args.length), args.out / "artifacts")
    given = argparse.Namespace(**vars(args), tasks=list(REAL_TASKS), seed=0, peers=False, batch=1, answers=None)
    given.answered = [e.series for e in every if e.series not in LEFT_OUT]
    given.answers = Log(args.out / "tokens_answers.jsonl")
    name = "tokens_seen" if args.seen else "tokens"
    log = Log(args.out / "tokens_kl.jsonl")
    with tqdm(desc="answers", unit="answer") as bar:
        rows = equal_bytes.measure(model, tokenizer, every, args.length, given, log, bar)
    for row in rows:
        row.pop("hits", None)
        if args.seen:
            row.pop("text", None)  # no question is in it
    record = {
        "command": " ".join(["python", *sys.argv]),
        "setting": setting(torch.device("cpu")),
        "length": args.length,
    }
    files.write_json(args.out / f"{name}.json", record | {"rows": rows})
    (args.out / f"{name}.md").write_text(page(rows))
    print(page(rows))


if __name__ == "__main__":
    main()

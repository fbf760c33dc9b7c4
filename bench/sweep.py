"""Every model type that transformers knows: 40 tokens over a lossless cache of ours beside DynamicCache's.

    python bench/sweep.py                          # all types, 15 minutes on two cores
    python bench/sweep.py --only llama,gpt_oss     # some

Models are tiny and random, in float32 (tiny_models.py). A type is identical, different, refused (by make_cache or by
the first step, with the reason), or could not be built or run with a text alone. `kvshrink models` shows what
is written.
"""

import argparse
import json
import multiprocessing
import resource
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_models import build, names
from tiny_settings import SKIPPED
from tqdm import tqdm

import kvshrink
from kvshrink import RTN
from kvshrink.errors import KVShrinkError
from kvshrink.store import files

OUT, PAGE = Path("src/kvshrink/data/models.json"), Path("docs/models.md")
PROMPT, NEW = 150, 40
SECONDS, MEMORY = 60, 6 << 30  # of one type


def outcome(kind: str, name: str) -> dict[str, Any]:
    """{"status", "reason" or what was seen}."""
    try:
        model = build(kind, name)
    except Exception as error:
        return {"status": "not built", "reason": _line(error)}
    try:
        tokens, logits = decoded(model, None)
    except Exception as error:
        return {"status": "no text alone", "reason": _line(error)}
    try:
        cache = kvshrink.make_cache(model, RTN(bits=None))
        ours, own = decoded(model, cache)
    except KVShrinkError as error:
        return {"status": "refused", "reason": _line(error)}
    except Exception as error:
        return {"status": "crashed", "reason": f"{type(error).__name__}: {_line(error)}"}
    same = ours == tokens
    count = NEW if same else next(i for i, (a, b) in enumerate(zip(ours, tokens, strict=True)) if a != b) + 1
    error = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(own[:count], logits[:count], strict=True))
    return {
        "status": "identical" if same else "different",
        "layers": len(cache.layers),
        "compressed": len(cache.compressed),
        "keys": keys_of(model),
        "distinct": len(set(tokens)),
        "logits": float(f"{error:.1e}"),
    }


@torch.inference_mode()
def decoded(model: Any, cache: Any) -> tuple[list[int], tuple]:
    """(tokens, logits of each step), greedily."""
    ids = torch.randint(3, 110, (1, PROMPT), generator=torch.Generator().manual_seed(5))
    given = {} if cache is None else {"past_key_values": cache}
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **given,
    )
    return out.sequences[0, -NEW:].tolist(), out.logits


BESIDE = {
    "sliding_attention": "beside sliding attention",
    "chunked_attention": "beside chunked attention",
    "linear_attention": "beside linear attention",
    "conv": "beside convolutions",
    "dummy": "beside layers without a cache of their own",
    "hybrid": "with a state in each layer",
    "hybrid_sliding": "beside states with sliding attention",
}


def keys_of(model: Any) -> list[str]:
    """What is seen of the keys of shrunken layers, and of layers that stay as they are."""
    found: dict[str, None] = {}
    for info in kvshrink.attach(model).layers:
        if info.kind in BESIDE:
            found[BESIDE[info.kind]] = None
        if not info.compressed:
            continue
        if info.latent:
            mla = info.key_dim != info.value_dim
            found["MLA latents, for quantisers" if mla else "given back whole at each step"] = None
        elif info.moves:
            found["turned in a way that cannot be undone: best with methods after RoPE"] = None
        elif info.rope is None:
            found["without RoPE"] = None
        else:
            found["RoPE of pairs" if info.rope.interleaved else "RoPE"] = None
    return list(found)


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def page(found: dict[str, Any]) -> str:
    """docs/models.md."""
    lines = [
        "# Model types",
        "",
        f"Written by `make models` with transformers {found['transformers']}. Of each type of model a tiny random one, "
        f"in float32, generates {NEW} tokens after {PROMPT} over a lossless cache of ours and over DynamicCache. "
        "`kvshrink models` shows the same; `kvshrink inspect --model` says what is seen of yours. A type that is not "
        "here is looked at in the same way, and refused where anything is not understood.",
    ]
    for kind, counts in found["counts"].items():
        own = [r for r in found["rows"] if r["kind"] == kind]
        lines += ["", f"## {kind.capitalize()}: {counts.get('identical', 0)} types with the same tokens", ""]
        lines += ["| keys of shrunken layers; other layers, which stay as they are | types |", "|---|---|"]
        groups: dict[str, list[str]] = {}
        for r in own:
            if r["status"] == "identical":
                groups.setdefault(", ".join(sorted(r["keys"])), []).append(r["type"])
        lines += [f"| {keys} | {', '.join(sorted(types))} |" for keys, types in sorted(groups.items())]
        for status, title in (("different", "Other tokens"), ("crashed", "Fail"), ("refused", "Refused")):
            rows = [r for r in own if r["status"] == status]
            if rows:
                lines += ["", f"{title}:", "", *(f"- {r['type']}: {r['reason']}" for r in rows)]
        rest = [r["type"] for r in own if r["status"] in ("not built", "no text alone", "skipped")]
        lines += [
            "",
            f"Could not be tried (not tiny, not built from its config, or not run by text alone): {', '.join(rest)}.",
        ]
    return "\n".join(lines) + "\n"


def _child(kind: str, name: str, pipe: Any) -> None:
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    pipe.send(outcome(kind, name))


def one(job: tuple[str, str]) -> dict[str, Any]:
    """In a process of its own: a type may take all memory, or not end."""
    kind, name = job
    if name in SKIPPED:
        return {"kind": kind, "type": name, "status": "skipped", "reason": SKIPPED[name]}
    here, there = multiprocessing.get_context("fork").Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_child, args=(kind, name, there))
    started = time.perf_counter()
    process.start()
    there.close()
    try:
        found = here.recv()
    except EOFError:
        found = {"status": "skipped", "reason": f"takes more than {SECONDS} s or {MEMORY >> 30} GiB"}
    process.join()
    return {"kind": kind, "type": name, **found, "seconds": round(time.perf_counter() - started, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="types, with commas between them")
    parser.add_argument("--kind", choices=("text", "image-text"))
    parser.add_argument("--out", type=Path, default=None, help=f"{OUT} where all types are run")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    kinds = [args.kind] if args.kind else ["text", "image-text"]
    only = set(filter(None, args.only.split(",")))
    jobs = [(kind, name) for kind in kinds for name in names(kind) if not only or name in only]
    rows = []
    bar = tqdm(jobs, unit="type")
    for job in bar:
        rows.append(one(job))
        if only or rows[-1]["status"] in ("different", "crashed"):
            bar.write(json.dumps(rows[-1]))
    counts: dict[str, dict[str, int]] = {kind: {} for kind in kinds}
    for row in rows:
        counts[row["kind"]][row["status"]] = counts[row["kind"]].get(row["status"], 0) + 1
    print(json.dumps(counts))
    out = args.out or (None if only or args.kind else OUT)
    if out is not None:
        found = {"transformers": transformers.__version__, "torch": torch.__version__, "counts": counts, "rows": rows}
        files.write_json(out, found)
        if args.out is None:
            PAGE.write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    main()

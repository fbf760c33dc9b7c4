"""New tokens of `generate` and nothing else, of a source tree, for a profiler; and a picture of what it saw.

    py-spy record -r 250 -d 30 -f raw -o before.raw -- python bench/flame.py run ../before "KIVI int4" 1024
    py-spy record -r 250 -d 30 -f raw -o after.raw -- python bench/flame.py run . "KIVI int4" 1024
    python bench/flame.py draw before.raw after.raw --out bench/results/flame.png

Four layers of Llama-3.1-8B's attention shape over so many tokens in the cache, one thread, until the profiler ends it.
Widths are shares of an attention layer's time, in `LlamaAttention.forward`; what wraps modules is left out.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

ROOT = "LlamaAttention.forward"
WRAPS = ("_call_impl", "_wrapped_call_impl", "wrapper", "inner", "<listcomp>", "<genexpr>", "run", "__get__")


def run(tree: str, name: str, tokens: int) -> None:
    sys.path[:0] = [f"{tree}/src", f"{tree}/bench"]
    import decode
    import generate as g
    import torch

    torch.set_num_threads(1)
    with torch.inference_mode():
        plain, model = (g.random_model(torch.bfloat16, torch.device("cpu")) for _ in range(2))
        attachment = g.attach(model)
        cache = g.make_cache(model, g.artifact(model, decode.METHODS[name]))
        g.fill(cache, g.dense(plain, tokens), attachment)
        ids = torch.randint(1, 512, (1, tokens + 1))
        model.generate(ids, past_key_values=cache, max_new_tokens=100_000, do_sample=False)


Tree = dict[str, list[Any]]  # name: [samples, whether ours, Tree]


def tree_of(raw: Path) -> tuple[int, Tree]:
    """(samples, what they were in) from lines "frame;frame;... samples"."""
    tree: Tree = {}
    total = 0
    for line in raw.read_text().splitlines():
        stack, count = line.rsplit(" ", 1)
        frames = stack.split(";")
        roots = [i for i, frame in enumerate(frames) if frame.startswith(ROOT)]
        if not roots:
            continue
        total, at = total + int(count), tree
        for frame in frames[roots[-1] + 1 :]:
            name, _, place = frame.partition(" (")
            if name.split(".")[-1] in WRAPS:
                continue
            own = at.setdefault(f"{name} {Path(place.split(':')[0]).name}", [0, "kvshrink" in place, {}])
            own[0], at = own[0] + int(count), own[2]
    return total, tree


def draw(raws: list[Path], out: Path) -> None:
    from kvshrink.eval.report.plots import pyplot, save

    plt = pyplot()
    figure, axes = plt.subplots(len(raws), 1, figsize=(14, 4.5 * len(raws)), layout="constrained")
    for axis, raw in zip(axes, raws, strict=True):
        total, tree = tree_of(raw)
        _boxes(axis, tree, 0.0, 0, total)
        axis.set_title(f"{raw.stem}: shares of {ROOT}, {total} samples", fontsize=10)
        axis.set_xlim(0, 1)
        axis.set_axis_off()
    save(figure, out)


def _boxes(axis: Any, tree: Tree, left: float, depth: int, total: int) -> None:
    axis.set_ylim(max(axis.get_ylim()[0], depth + 1), 0)
    for name, (count, ours, below) in sorted(tree.items(), key=lambda item: -item[1][0]):
        width = count / total
        if width < 0.004:
            break
        axis.barh(depth, width, 0.95, left, align="edge", color="#8fc1e3" if ours else "#dddddd", edgecolor="white")
        if width > 0.03:
            text = name.split(" ")[0] if width < 0.12 else name
            axis.text(left + 0.002, depth + 0.5, text[: int(width * 190)], fontsize=6, va="center", clip_on=True)
        _boxes(axis, below, left, depth + 1, total)
        left += width


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run")
    runs.add_argument("tree")
    runs.add_argument("name")
    runs.add_argument("tokens", type=int)
    draws = commands.add_parser("draw")
    draws.add_argument("raws", type=Path, nargs="+")
    draws.add_argument("--out", type=Path, default=Path("bench/results/flame.png"))
    args = parser.parse_args()
    if args.command == "run":
        run(args.tree, args.name, args.tokens)
    else:
        draw(args.raws, args.out)


if __name__ == "__main__":
    main()

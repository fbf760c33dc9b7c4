"""What a head's output loses when few tokens stay: dropped, with values matched, with a bias each, with moved keys.

    python bench/matching.py                                   # writes bench/results/matching.json

SmolLM2, 2,048 tokens of held-out text, seven layers, all KV heads. Queries to match by come of the model reading the
text again (attach/judging.py); the error is of the next 128 tokens' queries, which see the text, what came after the
text, sinks and window: norm of the change over norm of the output, in the mean over heads. "bias": as the paper has it,
a number added to each kept token's score; "moved": the key moves instead (cache/matching.py). as read: queries where
they read; turned: where the next tokens stand.
"""

import argparse
import sys
from pathlib import Path

import torch
from timing import setting
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

from kvshrink.attach import attach
from kvshrink.attach.judging import Reread
from kvshrink.cache import matching
from kvshrink.cache.matching import _ridge, _seen, behind, bounded_gains, matched
from kvshrink.cli._common import load
from kvshrink.eval.run.measure import held_out
from kvshrink.store import files

TOKENS, AFTER, QUERIES, WINDOW, SINKS = 2048, 128, 1024, 64, 4
LAYERS = (0, 3, 8, 14, 20, 26, 29)


def heard(model, ids: Tensor) -> tuple[DynamicCache, dict[int, Tensor], dict[int, Tensor], dict[int, tuple]]:
    """(the text's cache, queries of its repetition, queries of what comes next, keys and values of that), by layer."""
    dense = DynamicCache(config=model.config)
    model(ids[:, :TOKENS], past_key_values=dense, logits_to_keep=1)
    found: list[dict[int, Tensor]] = [{}, {}]
    after = {}
    for into, part, first in ((found[0], ids[:, :TOKENS], TOKENS), (found[1], ids[:, TOKENS:], TOKENS)):

        def note(layer, query, keys, scale, softcap, sinks, into=into):
            into[layer] = (query[0] * scale).clone()

        cache = Reread(dense.layers, note)
        at = torch.arange(first, first + part.shape[1])[None]
        model(part, past_key_values=cache, position_ids=at, logits_to_keep=1)
        after = {i: (x.keys[0, :, TOKENS:], x.values[0, :, TOKENS:]) for i, x in enumerate(cache.layers)}
    return dense, *found, after


def output(queries, keys, values, after, bias=None) -> Tensor:
    """Of queries [m, d] that see all keys, and of the tokens after the text those up to their own."""
    new_keys, new_values = after
    old, new = queries @ keys.T, queries @ new_keys.T
    old = old if bias is None else old + bias
    later = torch.ones(len(new_keys), len(new_keys), dtype=torch.bool).triu(1)
    new = new.masked_fill(later.repeat(len(queries) // len(new_keys), 1), -torch.inf)
    return torch.cat([old, new], 1).softmax(1) @ torch.cat([values, new_values])


def with_bias(queries, keys, values, kept, rest_keys, rest_values) -> tuple[Tensor, Tensor]:
    """(values, bias) of the kept tokens: the same squares, the keys where they were."""
    every = torch.cat([keys, rest_keys]), torch.cat([values, rest_values])
    whole, share, out = _seen(queries, *every, len(keys), None, None)
    old = keys[kept]
    bias = bounded_gains((queries @ old.T - whole).exp(), share)
    own, others = torch.cat([queries @ old.T + bias, queries @ rest_keys.T], 1).softmax(1).tensor_split([len(kept)], 1)
    return values[kept] + _ridge(own, out - others @ rest_values - own @ values[kept], share), bias


def errors(count: int, given: tuple, after: tuple, asked: Tensor, sets: dict[str, Tensor]) -> dict[str, float]:
    """Of one head. given: keys and values of the text; asked: queries of what comes next."""
    keys, values = given
    block, rest = slice(SINKS, TOKENS - WINDOW), [*range(SINKS), *range(TOKENS - WINDOW, TOKENS)]
    most = (sets["as read"] @ keys.T).softmax(1).amax(0)[block]
    kept = most.topk(count).indices.sort().values
    wanted = output(asked, keys, values, after)
    found = {}

    def add(name, own_keys, own_values, bias=None):
        more = None if bias is None else torch.cat([torch.zeros(len(rest)), bias])
        every = torch.cat([keys[rest], own_keys]), torch.cat([values[rest], own_values])
        got = output(asked, *every, after, more)
        found[name] = float((got - wanted).norm() / wanted.norm())

    add("dropped", keys[block][kept], values[block][kept])
    for name, queries in sets.items():
        own = (queries, keys[block], values[block], kept, keys[rest], values[rest])
        add(f"moved, {name}", *matched(*own))
        other, bias = with_bias(*own)
        add(f"bias, {name}", keys[block][kept], other, bias)
        bound, matching.BOUND = matching.BOUND, 0.0
        add(f"values alone, {name}", *matched(*own))
        matching.BOUND = bound
    return found


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kept", type=int, nargs="+", default=[64, 204])
    parser.add_argument("--out", type=Path, default=Path("bench/results/matching.json"))
    args = parser.parse_args()
    model, tokenizer = load("smollm2")
    infos = attach(model).layers
    ids = torch.as_tensor(held_out(tokenizer, TOKENS + AFTER, 1, 0)[0]).view(1, -1)
    dense, again, asked, after = heard(model, ids)
    rows: dict[int, list[dict[str, float]]] = {count: [] for count in args.kept}
    read, last = torch.arange(TOKENS, 2 * TOKENS)[None], torch.tensor([TOKENS - 1])
    for layer in tqdm(LAYERS):
        keys, values = (x[0].float() for x in (dense.layers[layer].keys, dense.layers[layer].values))
        h = len(keys)
        by_token = again[layer].float().unflatten(0, (h, -1))  # [h, m, x, d]
        turned = behind(by_token.flatten(0, 1)[None], read, last, infos[layer].rope)[0].unflatten(0, (h, -1))
        for head in range(h):
            some = torch.randperm(by_token[0, :, :, 0].numel(), generator=torch.Generator().manual_seed(0))[:QUERIES]
            sets = {"as read": by_token, "turned": turned}
            sets = {name: x[head].flatten(0, 1)[some] for name, x in sets.items()}
            own = asked[layer].float().unflatten(0, (h, -1))[head].flatten(0, 1)
            new = tuple(x[head].float() for x in after[layer])
            for count in args.kept:
                rows[count].append(errors(count, (keys[head], values[head]), new, own, sets))
    means = {
        count: {name: round(sum(r[name] for r in own) / len(own), 4) for name in own[0]} for count, own in rows.items()
    }
    record = {"what": "error of a head's output", "command": " ".join(["python", *sys.argv]), "tokens": TOKENS}
    files.write_json(
        args.out, record | {"setting": setting(torch.device("cpu")), "heads": len(LAYERS) * 3, "kept": means}
    )
    print(means)


if __name__ == "__main__":
    main()

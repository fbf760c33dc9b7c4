"""kvshrink generate: continue a prompt over a shrunken cache, and say what the cache held."""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from kvshrink.attach import make_cache
from kvshrink.cache import KVCache
from kvshrink.cli import _context
from kvshrink.cli._common import (
    MANY,
    BitsOption,
    JsonOption,
    KeepOption,
    ModelOption,
    SpecOption,
    TextOption,
    console,
    load,
    one_method,
    print_json,
    refuse_beside,
    refuse_text,
)
from kvshrink.data.text import read_text
from kvshrink.errors import DataError
from kvshrink.eval.run import calibration
from kvshrink.eval.run.catalogue import check_context
from kvshrink.eval.run.prompt import encode
from kvshrink.eval.run.runner import greedy
from kvshrink.eval.tasks import Sample
from kvshrink.fit.job import fit_all
from kvshrink.methods._roles import Method
from kvshrink.methods.artifact import Artifact


def generate(
    prompt: Annotated[list[str] | None, typer.Option(help="The prompt; repeatable with --context.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A file with the prompt.")] = None,
    model: ModelOption = "reference",
    artifact: Annotated[Path | None, typer.Option(help="A fitted artifact instead of --method.")] = None,
    context: Annotated[Path | None, typer.Option(help="A folder of `kvshrink compact`: prompts ask about it.")] = None,
    method: SpecOption = None,
    keep: KeepOption = None,
    bits: BitsOption = None,
    text: TextOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=MANY)] = 64,
    json: JsonOption = False,
) -> None:
    """Generate greedily with a shrunken cache and print what it held beside a full one."""
    prompts = _prompts(prompt, prompt_file, context)
    if context is not None:
        refuse_beside(context, "context", artifact=artifact, method=method, keep=keep, bits=bits, text=text)
        net, tokenizer = load(model)
        document = _context.read(context, net)
        answers = []
        for prompt_text in prompts:
            console.print(f"> {prompt_text}")
            cache, ids = document.asked(prompt_text, tokenizer)
            _check_room(net, ids, max_new_tokens)
            answers.append(_answer(net, tokenizer, cache, ids, max_new_tokens))
        if json:
            print_json({"context": str(context), "answers": answers})
        return
    refuse_beside(artifact, method=method, keep=keep, bits=bits, text=text)
    chosen: Method | Artifact
    chosen = Artifact.from_pretrained(artifact) if artifact else one_method(method or "cskv", keep, bits)
    refuse_text(text, [chosen])
    texts = calibration.texts(text)
    net, tokenizer = load(model)
    start, rest = encode(Sample(prompts[0], "", "", (), "", 0, {}), tokenizer)
    if not start:
        raise DataError("the prompt has no token that the model knows. Give at least one word.")
    ids = torch.tensor([start + rest], device=net.device)  # the rest is the end of a chat template
    _check_room(net, ids, max_new_tokens)  # before a fit
    if isinstance(chosen, Method) and chosen.needs_fit:
        chosen = fit_all(net, [chosen], texts, tokenizer, batch=4)[0]
    answer = _answer(net, tokenizer, make_cache(net, chosen), ids, max_new_tokens)
    if json:
        print_json(answer)


def _check_room(net: Any, ids: Tensor, new: int) -> None:
    check_context(net, ids.shape[1] + new, f"{ids.shape[1]} of the prompt + {new} new")


def _answer(net: Any, tokenizer: Any, cache: KVCache, ids: Tensor, max_new_tokens: int) -> dict[str, Any]:
    """Print what comes next, and what the cache held; both as a JSON object has them."""
    with torch.inference_mode(), greedy(net, net.generation_config.eos_token_id, tokenizer.pad_token_id or 0):
        out = net.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=max_new_tokens,
        )
    answer = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    console.print(answer)
    console.print(f"\n{cache.report()}")
    return {"output": answer, "tokens": ids.shape[1], **cache.report().to_dict()}


def _prompts(given: list[str] | None, file: Path | None, context: Path | None) -> list[str]:
    if bool(given) == (file is not None):
        raise DataError("give the prompt either by --prompt or by --prompt-file.")
    found = given or [read_text(p, "cannot read prompt file") for p in [file] if p is not None]
    if len(found) > 1 and context is None:
        raise DataError(f"{len(found)} prompts without --context. Give one, or a document that they ask about.")
    if not all(p.strip() for p in found):
        raise DataError("the prompt is empty. Give at least one word.")
    return found

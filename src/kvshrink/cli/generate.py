"""kvshrink generate: continue a prompt over a shrunken cache, and say what the cache held."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from kvshrink.attach import make_cache
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
    prompt: Annotated[str | None, typer.Option(help="The prompt.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A file with the prompt.")] = None,
    model: ModelOption = "reference",
    artifact: Annotated[Path | None, typer.Option(help="A fitted artifact instead of --method.")] = None,
    method: SpecOption = None,
    keep: KeepOption = None,
    bits: BitsOption = None,
    text: TextOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=MANY)] = 64,
    json: JsonOption = False,
) -> None:
    """Generate greedily with a shrunken cache and print what it held beside a full one."""
    given = _prompt(prompt, prompt_file)
    refuse_beside(artifact, method=method, keep=keep, bits=bits, text=text)
    chosen: Method | Artifact
    chosen = Artifact.from_pretrained(artifact) if artifact else one_method(method or "cskv", keep, bits)
    refuse_text(text, [chosen])
    texts = calibration.texts(text)
    net, tokenizer = load(model)
    context, rest = encode(Sample(given, "", "", (), "", 0, {}), tokenizer)
    if not context:
        raise DataError("the prompt has no token that the model knows. Give at least one word.")
    ids = torch.tensor([context + rest], device=net.device)  # the rest is the end of a chat template
    check_context(net, ids.shape[1] + max_new_tokens, f"{ids.shape[1]} of the prompt + {max_new_tokens} new")
    if isinstance(chosen, Method) and chosen.needs_fit:
        chosen = fit_all(net, [chosen], texts, tokenizer, batch=4)[0]
    cache = make_cache(net, chosen)
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
    if json:
        print_json({"output": answer, "tokens": ids.shape[1], **cache.report().to_dict()})


def _prompt(prompt: str | None, prompt_file: Path | None) -> str:
    if (prompt is None) == (prompt_file is None):
        raise DataError("give the prompt either by --prompt or by --prompt-file.")
    if prompt is None:
        assert prompt_file is not None
        prompt = read_text(prompt_file, "cannot read prompt file")
    if not prompt.strip():
        raise DataError("the prompt is empty. Give at least one word.")
    return prompt

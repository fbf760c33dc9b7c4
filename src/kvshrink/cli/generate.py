"""kvshrink generate: continue a prompt over a shrunken cache, and say what the cache held."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from kvshrink.attach import make_cache
from kvshrink.cli._common import (
    BitsOption,
    JsonOption,
    KeepOption,
    ModelOption,
    TextOption,
    console,
    load,
    one_method,
    print_json,
    refuse_beside,
)
from kvshrink.errors import DataError
from kvshrink.eval import calibration
from kvshrink.eval.prompt import encode
from kvshrink.eval.tasks import Sample
from kvshrink.fit.job import fit_all
from kvshrink.methods._roles import Method
from kvshrink.methods.artifact import Artifact


def generate(
    prompt: Annotated[str | None, typer.Option(help="The prompt.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A file with the prompt.")] = None,
    model: ModelOption = "reference",
    artifact: Annotated[Path | None, typer.Option(help="A fitted artifact; else --method is used.")] = None,
    method: Annotated[str, typer.Option("--method", help="A method, fitted first if it needs it.")] = "cskv",
    keep: KeepOption = None,
    bits: BitsOption = None,
    text: TextOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    json: JsonOption = False,
) -> None:
    """Generate greedily with a shrunken cache and print what it held beside a full one."""
    given = _prompt(prompt, prompt_file)
    refuse_beside(artifact, keep=keep, bits=bits, text=text)
    chosen: Method | Artifact = Artifact.from_pretrained(artifact) if artifact else one_method(method, keep, bits)
    net, tokenizer = load(model)
    if isinstance(chosen, Method) and chosen.needs_fit:
        chosen = fit_all(net, [chosen], calibration.texts(text), tokenizer, batch=4)[0]
    context, rest = encode(Sample(given, "", "", (), "", 0, {}), tokenizer)
    ids = torch.tensor([context + rest], device=net.device)  # the rest is the end of a chat template
    cache = make_cache(net, chosen)
    with torch.inference_mode():
        out = net.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id or 0,
        )
    answer = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    console.print(answer, markup=False, highlight=False)
    console.print(f"\n{cache.report()}", markup=False, highlight=False)
    if json:
        print_json({"output": answer, "tokens": ids.shape[1], **cache.report().to_dict()})


def _prompt(prompt: str | None, prompt_file: Path | None) -> str:
    if (prompt is None) == (prompt_file is None):
        raise DataError("give the prompt either by --prompt or by --prompt-file.")
    if prompt is None:
        assert prompt_file is not None
        try:
            prompt = prompt_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read prompt file {prompt_file}: {error}. Give a UTF-8 text file.") from error
    if not prompt.strip():
        raise DataError("the prompt is empty. Give at least one word.")
    return prompt

"""kvshrink compact: read a document once, shrink it, and keep it for any number of questions."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from kvshrink.attach import make_cache
from kvshrink.cli import _context
from kvshrink.cli._common import (
    JsonOption,
    ModelOption,
    TextOption,
    console,
    load,
    one_method,
    print_json,
    refuse_beside,
    refuse_text,
)
from kvshrink.cli._outputs import digest, place, run_folder
from kvshrink.data.text import read_text
from kvshrink.errors import DataError
from kvshrink.eval.run import calibration
from kvshrink.eval.run.catalogue import check_context
from kvshrink.fit.job import fit_all
from kvshrink.methods._roles import Method
from kvshrink.methods.artifact import Artifact
from kvshrink.methods.text import text_of

DEFAULT = "attention_matching:ratio=0.35 + turboquant:bits=4"


def compact(
    document: Annotated[Path, typer.Option(help="A text file.")],
    out: Annotated[Path, typer.Option(help="Folder for the shrunken cache.")],
    model: ModelOption = "reference",
    artifact: Annotated[Path | None, typer.Option(help="A fitted artifact instead of --method.")] = None,
    method: Annotated[
        str | None, typer.Option("--method", help=f"name:setting=value,... (docs/methods.md); default: {DEFAULT}.")
    ] = None,
    text: TextOption = None,
    json: JsonOption = False,
) -> None:
    """Read a document once and keep it shrunken; ask it by `kvshrink generate --context OUT --prompt ...`."""
    refuse_beside(artifact, method=method, text=text)
    chosen: Method | Artifact
    chosen = Artifact.from_pretrained(artifact) if artifact else one_method(method or DEFAULT, None, None)
    refuse_text(text, [chosen])
    given = read_text(document, "cannot read document")
    if not given.strip():
        raise DataError(f"document {document} is empty. Give at least one word.")
    texts = calibration.texts(text)
    asked = {"command": "compact", "model": place(model), "document": digest(document, [given])}
    asked |= {"method": str(artifact) if isinstance(chosen, Artifact) else text_of(chosen), "text": digest(text, texts)}
    with run_folder(out, asked, _context.WRITES):
        net, tokenizer = load(model)
        ids = torch.tensor([_context.document_ids(given, tokenizer)], device=net.device)
        check_context(net, ids.shape[1] + 1, f"{ids.shape[1]} of the document + 1 new")
        if isinstance(chosen, Method) and chosen.needs_fit:
            chosen = fit_all(net, [chosen], texts, tokenizer, batch=4)[0]
        cache = make_cache(net, chosen)
        with console.status(f"reading {ids.shape[1]} tokens"), torch.inference_mode():
            net(input_ids=ids, past_key_values=cache, logits_to_keep=1)
        _context.write(out, cache, ids, chosen)
    console.print(f"{cache.report()}\nsaved {out}: {ids.shape[1]} tokens, for kvshrink generate --context {out}")
    if json:
        print_json({"out": str(out), "tokens": ids.shape[1], **cache.report().to_dict()})

"""kvshrink lm-eval: lm-evaluation-harness with the model `kvshrink` known to it."""

from typing import Annotated

import typer


def lm_eval(
    arguments: Annotated[
        list[str] | None, typer.Argument(help="Of lm-eval: see `kvshrink lm-eval run --help`, `... ls --help`.")
    ] = None,
) -> None:
    """Run lm-evaluation-harness on a compressed cache: its own command line, which then knows --model kvshrink.

    kvshrink lm-eval --model kvshrink --model_args 'pretrained=reference,method=cskv:keep=0.2;bits=4' --tasks ...

    Model arguments: pretrained (folder, hub id or 'reference'); method, its settings after ':' with ';' between them;
    keep, bits; artifact (a fitted one, instead of these); text (a file to fit on); chunk (tokens scored a step,
    default 1: more is faster and less strict); and those of lm-eval's own model `hf`, such as dtype and max_length.
    """
    # lm-eval is an extra, and slow to import
    from kvshrink.eval.run.harness import main

    main(arguments or [])


# all that follows is lm-eval's, so nothing of it is parsed here: `run --help` is the help of run
lm_eval.context_settings = {  # type: ignore[attr-defined] # typer reads it from the function
    "ignore_unknown_options": True,
    "allow_interspersed_args": False,
}

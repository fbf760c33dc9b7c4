"""The command line: one module per command. Errors are one line and exit code 2; an interrupt says how to go on."""

import sys

import typer

from kvshrink.cli import demo, evaluate, fit, generate, inspect
from kvshrink.errors import KVShrinkError

app = typer.Typer(
    help="Shrink the KV cache of a causal language model, in real bytes, and decode over the shrunken form.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command("demo")(demo.demo)
app.command("fit")(fit.fit)
app.command("generate")(generate.generate)
app.command("eval")(evaluate.evaluate)
app.command("inspect")(inspect.inspect)


def main() -> None:
    try:
        app()
    except KVShrinkError as error:
        print(f"kvshrink: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("kvshrink: interrupted. Run the same command again to go on where it stopped.", file=sys.stderr)
        sys.exit(130)

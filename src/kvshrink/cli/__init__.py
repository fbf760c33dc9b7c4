"""The command line: one module per command. Errors are one line and exit code 2; an interrupt says how to go on."""

import functools
import sys
from collections.abc import Callable

import typer

from kvshrink.cli import demo, evaluate, fit, generate, inspect
from kvshrink.errors import KVShrinkError

app = typer.Typer(
    help="Shrink the KV cache of a causal language model, in real bytes, and decode over the shrunken form.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _guarded(command: Callable[..., None]) -> Callable[..., None]:
    """The command with our errors and an interrupt turned into one line, before typer answers them its own way."""

    @functools.wraps(command)
    def run(*args, **kwargs) -> None:
        try:
            command(*args, **kwargs)
        except KVShrinkError as error:
            print(f"kvshrink: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("kvshrink: interrupted. Run fit, or eval with --out, again to go on.", file=sys.stderr)
            sys.exit(130)

    return run


COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo.demo,
    "fit": fit.fit,
    "generate": generate.generate,
    "eval": evaluate.evaluate,
    "inspect": inspect.inspect,
}
for name, command in COMMANDS.items():
    app.command(name)(_guarded(command))


def main() -> None:
    app()

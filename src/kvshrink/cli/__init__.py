"""The command line: one module per command. Errors are one line and exit code 2; an interrupt says how to go on."""

import sys
from collections.abc import Callable, Sequence

import typer
import typer.main

from kvshrink.cli import compact, demo, evaluate, fit, generate, inspect, lm_eval, models, plan, report
from kvshrink.cli._guard import exit_code

app = typer.Typer(
    help="Shrink the KV cache of a causal language model, in real bytes, and decode over the shrunken form.",
    pretty_exceptions_enable=False,
    add_completion=False,
)

COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo.demo,
    "plan": plan.plan,
    "fit": fit.fit,
    "generate": generate.generate,
    "compact": compact.compact,
    "inspect": inspect.inspect,
    "models": models.models,
    "report": report.report,
    "lm-eval": lm_eval.lm_eval,
}
for name, command in COMMANDS.items():
    app.command(name, context_settings=getattr(command, "context_settings", None))(command)
app.add_typer(evaluate.app, name="eval")


def main() -> None:
    sys.exit(exit_code(_run, sys.argv[1:]))


def _run(arguments: Sequence[str]) -> None:
    """The command that is named, without typer's own way of ending: all that it raises comes out."""
    if arguments and arguments[0] in ("plan", "eval"):  # what --byte-ratio was called
        arguments = [f"--byte-ratio{x[len('--kept') :]}" if x.partition("=")[0] == "--kept" else x for x in arguments]
    command = typer.main.get_command(app)
    with command.make_context("kvshrink", list(arguments) or ["--help"]) as context:
        command.invoke(context)

"""The command line: one module per command. Errors are one line and exit code 2; an interrupt says how to go on."""

from collections.abc import Callable

import typer

from kvshrink.cli import demo, evaluate, fit, generate, inspect, lm_eval, plan, report
from kvshrink.cli._common import guarded

app = typer.Typer(
    help="Shrink the KV cache of a causal language model, in real bytes, and decode over the shrunken form.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo.demo,
    "plan": plan.plan,
    "fit": fit.fit,
    "generate": generate.generate,
    "inspect": inspect.inspect,
    "report": report.report,
    "lm-eval": lm_eval.lm_eval,
}
for name, command in COMMANDS.items():
    app.command(name, context_settings=getattr(command, "context_settings", None))(guarded(command))
app.add_typer(evaluate.app, name="eval")


def main() -> None:
    app()

"""What commands share: loading models and text, method options, tables, the last JSON line."""

import functools
import json
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from kvshrink.errors import KVShrinkError, SettingError
from kvshrink.eval.entries import parse
from kvshrink.methods._roles import Method
from kvshrink.reference import FOLDER

ModelOption = Annotated[str, typer.Option("--model", help="A folder, a hub id, or 'reference' (bundled).")]
KeepOption = Annotated[float | None, typer.Option(help="Share of channels kept (rank over KV width).")]
BitsOption = Annotated[int | None, typer.Option(help="Bits of a stored number; default: the model's own dtype.")]
TextOption = Annotated[
    Path | None, typer.Option("--text", help="Calibration text file; default: a bundled book excerpt and records.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]
SpecOption = Annotated[str, typer.Option("--method", help="A method, or name:setting=value,... (docs/methods.md).")]

# a pipe or a file has no width of its own; tables would be squeezed to 80 columns
console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 140)


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """The command with our errors and an interrupt turned into one line, before typer answers them its own way."""

    @functools.wraps(command)
    def run(*args, **kwargs) -> None:
        try:
            command(*args, **kwargs)
        except KVShrinkError as error:
            print(f"kvshrink: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print(
                "kvshrink: interrupted. Run the same command again to go on (fit, eval with --out, plan with --work).",
                file=sys.stderr,
            )
            sys.exit(130)

    return run


def quiet() -> None:
    """Keep library chatter out of a command's output."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="transformers")
    from transformers.utils import logging as hf

    hf.disable_progress_bar()


def model_name(name: str) -> str:
    return str(FOLDER) if name == "reference" else name


def load(name: str):
    """(model, tokenizer). Raises KVShrinkError in one line if there is no such model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quiet()
    where = model_name(name)
    try:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoModelForCausalLM.from_pretrained(where, dtype="auto").eval().to(device)
        return model, AutoTokenizer.from_pretrained(where)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise KVShrinkError(f"cannot load model {name!r}: {reason}") from error


def refuse_beside(artifact: Path | None, **options: object) -> None:
    """An artifact has its settings; options that would change them must not be silently ignored."""
    given = [f"--{name}" for name, value in options.items() if value is not None]
    if artifact is not None and given:
        raise SettingError(f"{', '.join(given)} cannot change the artifact {artifact}. Leave it out, or fit another.")


def one_method(spec: str, keep: float | None, bits: int | None) -> Method:
    """The method of --method, with --keep and --bits where the spec names no settings itself."""
    given = {k: v for k, v in (("keep", keep), ("bits", bits)) if v is not None}
    method = parse(spec, given).method
    if not isinstance(method, Method):
        raise KVShrinkError(f"{spec!r} is not a method that shrinks anything. See docs/methods.md.")
    return method


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    table = Table(title=title or None, title_justify="left")
    for i, name in enumerate(head):
        table.add_column(name, justify="left" if i < 2 else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def print_json(data: dict) -> None:
    """The last line of a command with --json."""
    print(json.dumps(data))

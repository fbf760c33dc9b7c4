"""What commands share: options, loading models, methods by their options, tables, the last JSON line."""

import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from kvshrink.errors import KVShrinkError, SettingError
from kvshrink.eval.run.catalogue import check_context
from kvshrink.eval.run.entries import parse_all
from kvshrink.fit.job import default_length
from kvshrink.half_linear import in_float32_where_faster
from kvshrink.methods._roles import Method
from kvshrink.methods.artifact import Artifact
from kvshrink.reference import FOLDER, smollm2
from kvshrink.store.reason import line

MANY = 2**31 - 1  # tokens, rows or steps: more is a slip of the hand
MOST_CASES = 10_000  # samples or texts; all of them are held at once
MOST_ROWS = 1024  # sequences in a forward

ModelOption = Annotated[
    str, typer.Option("--model", help="A folder, a hub id, 'reference' (bundled) or 'smollm2' (a package).")
]
KeepOption = Annotated[float | None, typer.Option(help="Share of channels (rank over KV width).")]
BitsOption = Annotated[int | None, typer.Option(help="Bits of a stored number; default: the model's own dtype.")]
TextOption = Annotated[
    Path | None, typer.Option("--text", help="Calibration text file; default: a bundled book excerpt and records.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]
SpecOption = Annotated[
    str | None,
    typer.Option("--method", help="A method, or name:setting=value,... (docs/methods.md); default: cskv."),
]
LengthOption = Annotated[
    int | None,
    typer.Option(min=2, max=MANY, help="Tokens per calibration row; default: the model's context, to 1024."),
]
SeedOption = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of samples and texts.")]


# a pipe or a file has no width of its own; tables would be squeezed to 80 columns
console = Console(
    soft_wrap=True,
    width=None if sys.stdout is not None and sys.stdout.isatty() else 140,
    markup=False,  # paths and answers may hold brackets
    emoji=False,
    highlight=False,
)


def quiet() -> None:
    """Keep library chatter out of a command's output."""
    for name in ("transformers", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="transformers")
    from transformers.utils import logging as hf

    hf.disable_progress_bar()


def model_name(name: str) -> str:
    """What transformers is to load. Raises KVShrinkError on a path where no model can be."""
    if name == "reference":
        return str(FOLDER)
    if name == "smollm2" and not Path(name).is_dir():
        return str(smollm2.folder())
    a_path = name.startswith((".", "~", os.sep))
    if not name.strip() or Path(name).is_file() or (a_path and not Path(name).is_dir()):
        raise KVShrinkError(
            f"cannot load model {name!r}: no folder. Give a folder, a hub id, 'reference' or 'smollm2'."
        )
    return name


def load(name: str) -> tuple[Any, Any]:
    """(model, tokenizer). Raises KVShrinkError in one line if there is no such model, or only a part of one."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quiet()
    where = model_name(name)
    try:
        options: dict = {"trust_remote_code": False}  # else transformers asks on the terminal
        told = options | {"dtype": "auto", "output_loading_info": True, "ignore_mismatched_sizes": True}
        with warnings.catch_warnings(action="ignore"):
            loaded: Any = AutoModelForCausalLM.from_pretrained(where, **told)
            model, found = loaded
            tokenizer = AutoTokenizer.from_pretrained(where, **options)
            model = in_float32_where_faster(model.eval().to("cuda" if torch.cuda.is_available() else "cpu"))
    except Exception as error:  # files of any content come in here, and transformers raises what it meets
        raise KVShrinkError(f"cannot load model {name!r}: {type(error).__name__}: {line(error)}.") from error
    if wrong := sorted([*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])]):
        raise KVShrinkError(
            f"cannot load model {name!r}: {len(wrong)} of its tensors are in no file or misshapen ({wrong[0]}). "
            "Save it again."
        )
    known, rows = tokenizer.vocab_size, model.get_input_embeddings().weight.shape[0]
    if known > rows:
        raise KVShrinkError(
            f"cannot load model {name!r}: its tokenizer has {known} tokens, the model {rows}. They are of two models."
        )
    return model, tokenizer


def row_length(model: Any, asked: int | None) -> int:
    """Tokens per calibration row. Raises EvalError if they are more than the model's context."""
    if asked is None:
        return default_length(model)
    check_context(model, asked, "--length")
    return asked


def refuse_beside(made: Path | None, kind: str = "artifact", **options: object) -> None:
    """What was made has its settings; options that would change them must not be silently ignored."""
    given = [f"--{name}" for name, value in options.items() if value is not None]
    if made is not None and given:
        raise SettingError(f"{', '.join(given)} cannot change the {kind} {made}. Leave it out, or make another.")


def refuse_text(text: Path | None, methods: Sequence[Method | Artifact | None]) -> None:
    """Calibration text has no effect where nothing is fitted."""
    if text is not None and not any(isinstance(m, Method) and m.needs_fit for m in methods):
        raise SettingError(f"--text {text} has no effect: no method of these is fitted. Leave it out.")


def refuse_scored(scored: int | None, documents: int) -> None:
    """Without documents no token of them is scored."""
    if scored is not None and not documents:
        raise SettingError(f"--scored {scored} has no effect beside --documents 0. Leave one out.")


def given_settings(keep: float | None, bits: int | None) -> dict[str, Any]:
    return {k: v for k, v in (("keep", keep), ("bits", bits)) if v is not None}


def one_method(spec: str, keep: float | None, bits: int | None) -> Method:
    """The method of --method, with --keep and --bits where the spec does not name them itself."""
    entry = parse_all([spec], given_settings(keep, bits))[0]
    if not isinstance(entry.method, Method) or entry.like is not None:
        raise KVShrinkError(f"{spec!r} is not a method that shrinks anything by itself. See docs/methods.md.")
    return entry.method


def names(option: str, text: str | None) -> list[str] | None:
    """The parts of "a,b"; None where the option was not given. Raises SettingError if there are none."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise SettingError(f"--{option} {text!r} names nothing. Give at least one, or leave it out.")
    return parts


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    table = Table(title=title or None, title_justify="left")
    for i, name in enumerate(head):
        table.add_column(name, justify="left" if i < 2 else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def print_json(data: dict) -> None:
    """The last line of a command with --json. A number that JSON has not (NaN, infinity) is null."""
    print(json.dumps(_finite(data)))


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {k: _finite(v) for k, v in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(v) for v in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data

"""From a command to its exit code: what goes wrong is one line on stderr and code 2, an interrupt is 130."""

import contextlib
import io
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence

import torch
import typer
from tqdm import tqdm

from kvshrink.errors import KVShrinkError, SettingError
from kvshrink.store.reason import line

TRACEBACK = "KVSHRINK_TRACEBACK"  # set to 1 it shows where an error was raised
AGAIN = "interrupted. Run the same command again to go on (fit, eval with --out, plan with --work)."
FAILED, INTERRUPTED = 2, 130
LONGEST = 1000  # characters of a line


def exit_code(command: Callable[[Sequence[str]], None], arguments: Sequence[str]) -> int:
    """Run the command with these arguments. Whatever it raises becomes a line on stderr."""
    try:
        _open_streams()
        _check(arguments)
        command(arguments)
        sys.stdout.flush()
    except typer.Exit as stop:
        return _flushed(stop.exit_code)
    except SystemExit as stop:  # of another program's command line, or of rich, which meets a closed pipe so
        if isinstance(stop.__context__, BrokenPipeError):
            _say(reason(stop.__context__))
            return FAILED
        return _flushed(stop.code if isinstance(stop.code, int) else FAILED if stop.code else 0)
    except KeyboardInterrupt:
        _say(AGAIN)
        return INTERRUPTED
    except Exception as error:
        if os.environ.get(TRACEBACK):
            traceback.print_exc()
        _say(reason(error))
        return FAILED
    return 0


def reason(error: Exception) -> str:
    """What went wrong, in one line."""
    if isinstance(error, KVShrinkError):
        return str(error)
    if hasattr(error, "format_message"):  # of the command line itself: typer has it from two different places
        context = getattr(error, "ctx", None)
        return f"{error.format_message().rstrip('.')}. See `{context.command_path if context else 'kvshrink'} --help`."
    if isinstance(error, BrokenPipeError):
        return "standard output was closed before all was written."
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "not enough memory" in str(error):
        return f"out of memory: {line(error)}. Use a smaller --batch, --tokens or --length."
    if isinstance(error, OSError) and error.strerror:
        return f"cannot read or write {error.filename or 'a file or standard output'}: {error.strerror}."
    return (
        f"this is a bug in kvshrink: {type(error).__name__}: {line(error)}. Please report it; "
        f"with {TRACEBACK}=1 in the environment the command shows where it happened."
    )


def _say(text: str) -> None:
    """One line on stderr, behind any progress bar; stdout is left alone from here on, since it may be what failed."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()
    said = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda found: repr(found[0])[1:-1], f"kvshrink: {text}")
    if len(said) > LONGEST:
        said = f"{said[: LONGEST // 2]} ... {said[-LONGEST // 2 :]}"
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    with contextlib.suppress(OSError, ValueError):
        print(said, file=sys.stderr, flush=True)
    _drop_stdout()


def _flushed(code: int) -> int:
    try:
        sys.stdout.flush()
    except OSError as error:
        _say(reason(error))
        return FAILED
    return code


def _drop_stdout() -> None:
    """Let the interpreter's last flush go nowhere if there is something that could not be written."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _open_streams() -> None:
    """Text that an encoding lacks is written as escapes. Raises SettingError if there is no stdout."""
    if sys.stderr is None:
        sys.stderr = io.StringIO()
    if sys.stdout is None:
        sys.stdout = io.StringIO()
        raise SettingError("standard output is closed. Send it to /dev/null if you do not want it.")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _check(arguments: Sequence[str]) -> None:
    """Raise SettingError on bytes that are no text: no tokenizer and no result file could hold them."""
    for text in arguments:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise SettingError(
                f"{text!r} is no text in this locale, such as UTF-8. Rename the file, or convert the text."
            ) from error

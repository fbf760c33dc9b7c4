"""What a fit is given, looked at before anything is run: methods, rows of text, options."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from kvshrink.errors import DataError, SettingError
from kvshrink.methods import build, name_of
from kvshrink.methods._roles import Method
from kvshrink.methods._training import Objective
from kvshrink.methods._types import shown

TRACKERS = ("tensorboard", "trackio")
ROW = 1024  # tokens of a calibration row


def check_given(
    methods: Sequence, tokenizer: Any, length: object, batch: object, checkpoint: object, log_with: object
) -> None:
    """Raise SettingError on what no fit could use."""
    if not methods:
        raise SettingError("no method is given. Pass one or more, such as kvshrink.CSKV(keep=0.2).")
    for method in methods:
        if not isinstance(method, Method):
            raise SettingError(f"{shown(method)} is not a method. Pass an object, such as kvshrink.CSKV(keep=0.2).")
        if not method.needs_fit:
            raise SettingError(f"{name_of(method)} needs no fit. Pass it to make_cache(model, method) as it is.")
    for name, value in (("length", ROW if length is None else length), ("batch", batch)):
        if type(value) is not int or value < 1:
            raise SettingError(f"{name}={shown(value)} is not possible. Use a whole number, 1 or more.")
    if tokenizer is not None and not callable(tokenizer):
        raise SettingError(f"tokenizer={shown(tokenizer)} is not possible. Pass the model's tokenizer.")
    if not isinstance(checkpoint, str | Path | None):
        raise SettingError(f"checkpoint={shown(checkpoint)} is not possible. Give the path of a folder.")
    if log_with not in (None, *TRACKERS):
        raise SettingError(f"log_with={shown(log_with)} is not possible. Use one of {TRACKERS}.")
    if log_with is not None and importlib.util.find_spec(log_with) is None:  # accelerate would log nothing
        raise SettingError(f"log_with={log_with} needs {log_with}: pip install {log_with}.")


def sharded(method: Any, shards: object) -> Any:
    """The method with bases for so many ranks. Raises SettingError where it has none that heads are shared out by."""
    if type(shards) is not int or shards < 1:
        raise SettingError(f"shards={shown(shards)} is not possible. Use a whole number, 1 or more.")
    if not isinstance(method, Method) or "shards" not in method.settings():
        name = name_of(method) if isinstance(method, Method) else shown(method)
        raise SettingError(f"{name} has no bases for several ranks. Take spectral or cskv, or leave shards out.")
    if (own := method.settings()["shards"]) not in (1, shards):
        raise SettingError(f"shards={shards} is not the method's own shards={own}. Leave one out.")
    return build(name_of(method), {**method.settings(), "shards": shards})


def enough(rows: Tensor, methods: Sequence[Method]) -> Tensor:
    """The rows, a single one cut in two where something is trained, since some must be held out."""
    page = max(method.page for method in methods)
    given = tuple(rows.shape)
    if len(rows) == 1 and any(m.training() for m in methods):
        rows = rows[:, : rows.shape[1] // 2 * 2].view(2, -1)
    halves = any(m.splits() or trains(m, "output") for m in methods)
    least = 2 * page if halves else page + 1
    if rows.shape[1] < least:
        what = "comparing halves of rows" if halves else "holding out half of a row"
        raise DataError(f"rows of shape {given} are too short for {what}: {rows.shape[1]} tokens a row, not {least}.")
    return rows


def check_ids(rows: Tensor, vocabulary: int) -> None:
    low, high = int(rows.min()), int(rows.max())
    if low < 0 or high >= vocabulary:
        raise DataError(f"token ids run from {low} to {high}, the model has 0 to {vocabulary - 1}. Use its tokenizer.")


def in_memory(method: Method) -> bool:
    """Whether a fit needs the whole model in memory."""
    return method.probes or trains(method, "kl")


def trains(method: Method, *losses: Objective) -> bool:
    """Whether something is trained on one of these losses."""
    training = method.training()
    return training is not None and training.loss in losses

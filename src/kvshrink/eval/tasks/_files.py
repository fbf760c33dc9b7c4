"""Rows of a stored benchmark: from a file or folder that the user has, or from the hub if that is asked for.

Nothing is downloaded unless hub=True. Every error quotes the layout that was expected, so that it can be put right.
"""

import contextlib
import csv
import importlib
import json
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, final

from kvshrink.data.text import literal
from kvshrink.errors import EvalError

Row = Mapping[str, Any]
SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
HUB_EXTRA = "pip install 'kvshrink[hub]'"


@final
@dataclass(frozen=True)
class Layout:
    """What a benchmark's file is called and holds.

    files: names inside a folder given as path=, without the suffix; the first that exists is read.
    row:   an example; every row must have its fields.
    repo:  the data set's name on the hub. Either `file` of it is downloaded (a `member` of it, if it is a zip file),
           or `table` are the arguments of datasets.load_dataset.
    """

    task: str
    files: tuple[str, ...]
    row: Row
    repo: str
    file: str = ""
    member: str = ""
    table: Row = field(default_factory=dict)

    def __str__(self) -> str:
        names = " or ".join(f"{name}.jsonl" for name in self.files)
        example = json.dumps(self.row, ensure_ascii=False)
        return f"Expected: {names} (.json, .parquet and .csv too) with rows like {example}"


def rows(layout: Layout, n: int | None, path: str | Path | None, hub: bool) -> list[Row]:
    """The first n rows (all if None). Raises EvalError for a missing or wrong file, or fewer rows than n."""
    if n is not None and n < 1:
        raise EvalError(f"{layout.task}: {n} samples asked. Ask for at least 1, or None for all.")
    if path is None and not hub:
        raise EvalError(f"{layout.task}: give its file as path=, or hub=True to download {layout.repo}. {layout}.")
    if path is not None:
        source = _find(layout, Path(path))
        found = list(islice(_read(layout, source), n))
        name = source.name
    else:
        found = list(islice(_download(layout), n))
        name = layout.repo
    if not found or (n is not None and len(found) < n):
        raise EvalError(
            f"{layout.task}: {n or 'all'} samples asked, {name} has {len(found)}. Ask for fewer cases. {layout}."
        )
    for i, row in enumerate(found):
        _check(layout, row, f"row {i} of {name}")
    return found


def texts(value: Any) -> tuple[str, ...]:
    """A field that holds one text or a list of them, which in a .csv file is written as a Python list."""
    if isinstance(value, str) and value.startswith("["):
        with contextlib.suppress(ValueError):
            value = literal(value)
    values = value if isinstance(value, list | tuple) else [value]
    return tuple(str(v) for v in values)


def choice(task: str, name: str, value: str, known: Iterable[str]) -> None:
    """Raises EvalError unless `value` is one of `known`."""
    known = tuple(known)
    if value not in known:
        raise EvalError(f"{task}: no {name} {value!r}. Known: {', '.join(known)}.")


def _find(layout: Layout, path: Path) -> Path:
    if path.is_file():
        return path
    for name in layout.files:
        for suffix in SUFFIXES:
            if (file := path / f"{name}{suffix}").is_file():
                return file
    what = "is no file or folder" if not path.is_dir() else "does not hold the file"
    raise EvalError(f"{layout.task}: {path} {what}. {layout}.")


def _check(layout: Layout, row: Any, where: str) -> None:
    if not isinstance(row, Mapping):
        raise EvalError(f"{layout.task}: {where} is a {type(row).__name__}, not an object. {layout}.")
    missing = [key for key in layout.row if key not in row]
    if missing:
        raise EvalError(f"{layout.task}: {where} has no field {', '.join(missing)}, but {', '.join(row)}. {layout}.")


def _read(layout: Layout, source: Path) -> Iterator[Row]:
    try:
        if source.suffix == ".parquet":
            yield from _need("pyarrow.parquet").read_table(source).to_pylist()
        elif source.suffix == ".csv":
            csv.field_size_limit(sys.maxsize)  # contexts are longer than the default of 128 KiB
            with source.open(encoding="utf-8-sig", newline="") as lines:
                yield from csv.DictReader(lines)
        elif source.suffix in SUFFIXES:
            with source.open(encoding="utf-8-sig") as lines:
                yield from _parse(lines)
        else:
            raise EvalError(f"{layout.task}: cannot read {source.name}: no {', '.join(SUFFIXES)} file. {layout}.")
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise EvalError(f"{layout.task}: cannot read {source} ({error}). {layout}.") from error


def _parse(lines: Iterable[str]) -> Iterator[Row]:
    """JSON objects, one a line, or one JSON list; some benchmarks call the first .json as well."""
    lines = (line for line in lines if line.strip())
    first = next(iter(lines), "")
    if first.lstrip().startswith("["):
        yield from json.loads(first + "".join(lines))
    elif first:
        yield json.loads(first)
        yield from map(json.loads, lines)


def _download(layout: Layout) -> Iterator[Row]:
    try:
        if layout.table:
            yield from _need("datasets").load_dataset(layout.repo, **layout.table)
            return
        hub = _need("huggingface_hub")
        local = Path(hub.hf_hub_download(layout.repo, layout.file, repo_type="dataset"))
        if not layout.member:
            yield from _read(layout, local)
            return
        with zipfile.ZipFile(local) as archive:
            member = next((name for name in archive.namelist() if name.endswith(f"/{layout.member}")), layout.member)
            yield from _parse(archive.read(member).decode().splitlines())
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        what = f"{layout.task}: cannot load {layout.file or dict(layout.table)} of {layout.repo} ({error})"
        raise EvalError(f"{what}. Download it yourself and give path=. {layout}.") from error


def _need(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise EvalError(f"{module.split('.')[0]} is missing ({error}). Install it: {HUB_EXTRA}.") from error

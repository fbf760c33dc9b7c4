"""What a prefix store is told: folder, method, size, and what a model in files is told from another by."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from kvshrink.attach.factory import digest_of
from kvshrink.errors import SettingError
from kvshrink.eval.run.entries import parse
from kvshrink.methods._roles import Method
from kvshrink.methods._types import shown
from kvshrink.methods.artifact import Artifact
from kvshrink.plan.budget import parse_bytes
from kvshrink.store.reason import line

DEFAULT = "turboquant:bits=4"  # which is not fitted
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
SAMPLE = 4096  # bytes of a tensor that are looked at, twice
RECORDS = 1  # version of how rows lie in a record: another one is another store


@dataclass(frozen=True)
class Named:
    """A method: its text, as on the command line, or where an artifact is (fitted)."""

    text: str
    fitted: bool = False

    def made(self) -> Method | Artifact | None:
        """The method; None: rows are kept as they are."""
        if self.fitted:
            return Artifact.from_pretrained(Path(self.text).expanduser())
        if self.text == "none":
            return None
        method = parse(self.text).method
        if method is None:
            raise SettingError(f'method={shown(self.text)} stores nothing else than rows. Say "none" for that.')
        return method


def _method_of(given: dict[str, Any], default: str | None, what: str, known: tuple[str, ...]) -> Named:
    """Takes the method's name. Raises SettingError if there is none, are two, or is anything unknown beside it."""
    if other := sorted(set(given) - {"method", "artifact", *known}):
        raise SettingError(
            f"{what} has no setting {shown(other[0])}. It has {', '.join(('method', 'artifact', *known))}."
        )
    if "method" in given and "artifact" in given:
        raise SettingError(f"{what} takes a method or an artifact, not both. Leave one out.")
    fitted = "artifact" in given
    found = given.pop("artifact") if fitted else given.pop("method", default)
    if not isinstance(found, str) or not found:
        raise SettingError(f'{what} needs a method, not {shown(found)}. Give one such as "turboquant:bits=4".')
    return Named(found, fitted)


@dataclass(frozen=True)
class StoreSettings:
    """path: the folder. method: "none" keeps rows as they are. limit: bytes. exact: how many of a prompt's first blocks
    are kept as they are, since the first tokens are attended to by all others."""

    path: str
    method: Named
    limit: int | None = 32 * 2**30
    exact: int = 1

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> "StoreSettings":
        """From JSON's values. Raises SettingError on anything that is no setting."""
        own = dict(given)
        method = _method_of(own, DEFAULT, "a prefix store", ("path", "limit", "exact"))
        path = own.get("path")
        if not isinstance(path, str) or not path:
            raise SettingError(f'a prefix store needs a folder, not path={shown(path)}. Give "path": "/where/to".')
        limit = size_of(own["limit"]) if "limit" in own else cls.limit
        return cls(path, method, limit, _count("exact", own.get("exact", cls.exact), "blocks"))


@dataclass(frozen=True)
class EngineSettings:
    """prefill: what a prompt's tokens see of those before them: "chunk", all of their own step exactly and older ones
    as stored; "window", the window exactly and older ones as stored, whatever the steps. sinks: None: the method's."""

    method: Named
    prefill: str = "chunk"
    sinks: int | None = None

    @classmethod
    def of(cls, given: object) -> "EngineSettings":
        """From JSON's values. Raises SettingError on anything that is no setting."""
        if not isinstance(given, Mapping):
            raise SettingError(
                f'"kvshrink" takes settings by name, not {shown(given)}. Give {{"artifact": "/a/folder"}}.'
            )
        own = dict(given)
        method = _method_of(own, None, '"kvshrink"', ("prefill", "sinks"))
        prefill = own.get("prefill", cls.prefill)
        if prefill not in ("chunk", "window"):
            raise SettingError(f'prefill={shown(prefill)} is not known. Give "chunk" or "window".')
        return cls(method, prefill, _count("sinks", own["sinks"], "tokens") if "sinks" in own else None)


def _count(name: str, given: object, what: str) -> int:
    if not isinstance(given, int) or isinstance(given, bool) or given < 0:
        raise SettingError(f"{name}={shown(given)} is no number of {what}. Give 0 or more.")
    return given


def size_of(given: object) -> int | None:
    """Bytes, from a number or a text such as "20GB" or "1.5 TiB"; None: no limit."""
    if given is None:
        return None
    if isinstance(given, bool) or not isinstance(given, int | str):
        raise SettingError(f'{shown(given)} is no size. Give bytes, a text such as "20GB", or null for no limit.')
    return parse_bytes(str(given))


def identity(folder: Path, method: Method | Artifact | None, exact: int, **more: Any) -> str:
    """What all blocks of a store that may be read for one another have in common. more: of the engine."""
    same = {"model": weights_of(folder), "method": "none" if method is None else digest_of(method), "records": RECORDS}
    return json.dumps({**same, "exact": exact, **more}, sort_keys=True)


def weights_of(folder: Path) -> str:
    """A hash of a model's, or an adapter's, settings and weights: of safetensors some bytes of each tensor, whose names
    and sizes are known without the rest; other files whole. Raises SettingError where no weights are."""
    paths = sorted(p for p in folder.iterdir() if p.suffix in WEIGHTS) if folder.is_dir() else []
    if not paths:
        raise SettingError(f"no weights are in {folder}, by which blocks of its model are told from others'.")
    found = hashlib.sha256()
    for path in sorted(folder.glob("*config.json")):
        found.update(path.read_bytes())
    for path in paths:
        found.update(json.dumps([path.name, path.stat().st_size]).encode())
        with path.open("rb") as file:
            if path.suffix == ".safetensors":
                _sample(file, found)
            else:
                found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


def _sample(file: BinaryIO, found: Any) -> None:
    """The header, and of each tensor its first bytes and some of its middle."""
    size = int.from_bytes(file.read(8), "little")
    header = file.read(min(size, os.fstat(file.fileno()).st_size))  # a file of any content may say any size
    found.update(header)
    try:
        tensors = json.loads(header)
        places = sorted(t["data_offsets"] for name, t in tensors.items() if name != "__metadata__")
    except (ValueError, KeyError, TypeError) as error:
        raise SettingError(f"{file.name} is no safetensors file: {line(error)}. Save the model again.") from error
    for begin, end in places:
        for at in (begin, (begin + end) // 2):
            file.seek(8 + size + at)
            found.update(file.read(min(SAMPLE, end - at)))


def key_of(identity: str, block: bytes, *more: str) -> str:
    """The name of a block: SHA-256 in hexadecimal. block: the engine's own hash of all tokens up to its end."""
    parts = [identity.encode(), block, *(text.encode() for text in more)]
    return hashlib.sha256(b"".join(len(part).to_bytes(8, "little") + part for part in parts)).hexdigest()

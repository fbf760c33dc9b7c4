"""What a prefix store is told: folder, method, size, and what a model in files is told from another by."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvshrink.attach.factory import digest_of
from kvshrink.errors import SettingError
from kvshrink.eval.run.entries import parse
from kvshrink.fit.source import local_folder
from kvshrink.methods._roles import Method
from kvshrink.methods._types import shown
from kvshrink.methods.artifact import Artifact

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", re.IGNORECASE)
SAMPLES, SAMPLE = 64, 4096  # parts of a file that are looked at, and bytes of one


@dataclass(frozen=True)
class StoreSettings:
    """path: the folder. method: as on the command line, or a folder of an artifact; "none": rows as they are.
    limit: bytes. exact: how many of a prompt's first blocks are kept as they are, since the first tokens are attended
    to by all others."""

    path: str
    method: str = "turboquant:bits=4"
    limit: int | None = 32 * 2**30
    exact: int = 1

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> "StoreSettings":
        """From JSON's values. Raises SettingError on anything that is no setting."""
        known = ("path", "method", "limit", "exact")
        if other := sorted(set(given) - set(known)):
            raise SettingError(f"a prefix store has no setting {shown(other[0])}. It has {', '.join(known)}.")
        path, method = given.get("path"), given.get("method", cls.method)
        if not isinstance(path, str) or not path:
            raise SettingError(f'a prefix store needs a folder, not path={shown(path)}. Give "path": "/where/to".')
        if not isinstance(method, str) or not method:
            raise SettingError(f'method={shown(method)} is no text. Give one such as "{cls.method}".')
        exact = given.get("exact", cls.exact)
        if not isinstance(exact, int) or isinstance(exact, bool) or exact < 0:
            raise SettingError(f"exact={shown(exact)} is no number of blocks. Give 0 or more.")
        return cls(path, method, size_of(given["limit"]) if "limit" in given else cls.limit, exact)

    def made(self) -> Method | Artifact | None:
        """The method; None: rows are kept as they are."""
        if self.method == "none":
            return None
        if Path(self.method).expanduser().is_dir():
            return Artifact.from_pretrained(Path(self.method).expanduser())
        method = parse(self.method).method
        if method is None:
            raise SettingError(f'method={shown(self.method)} stores nothing else than rows. Say "none" for that.')
        return method


def size_of(given: object) -> int | None:
    """Bytes, from a number or a text such as "20GB" or "1.5 TiB"; None: no limit."""
    if given is None:
        return None
    found = SIZE.fullmatch(given.strip()) if isinstance(given, str) else None
    if found is not None:
        given = int(float(found[1]) * UNITS[found[2].upper()])
    if not isinstance(given, int) or isinstance(given, bool) or given < 1:
        raise SettingError(f'{shown(given)} is no size. Give bytes, a text such as "20GB", or null for no limit.')
    return given


def identity(model: str, method: Method | Artifact | None, exact: int, **more: Any) -> str:
    """What all blocks of a store that may be read for one another have in common. more: of the engine."""
    same = {"model": weights_of(local_folder(model)), "method": "none" if method is None else digest_of(method)}
    return json.dumps({**same, "exact": exact, **more}, sort_keys=True)


def weights_of(folder: Path) -> str:
    """A hash of a model's config and of parts all over its files of weights: what is trained further has other ones."""
    found = hashlib.sha256()
    config = folder / "config.json"
    found.update(config.read_bytes() if config.is_file() else b"")
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".gguf")):
        size = path.stat().st_size
        found.update(json.dumps([path.name, size]).encode())
        with path.open("rb") as file:
            for n in range(SAMPLES):
                file.seek(n * max(0, size - SAMPLE) // (SAMPLES - 1))
                found.update(file.read(SAMPLE))
    return found.hexdigest()


def key_of(identity: str, block: bytes, *more: str) -> str:
    """The name of a block: SHA-256 in hexadecimal. block: the engine's own hash of all tokens up to its end."""
    parts = [identity.encode(), block, *(text.encode() for text in more)]
    return hashlib.sha256(b"".join(len(part).to_bytes(8, "little") + part for part in parts)).hexdigest()

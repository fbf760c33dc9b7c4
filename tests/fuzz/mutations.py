"""What may become of a file: damage to its bytes, other plain values, other tensors, with or without a right digest."""

import json
import shutil
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvshrink.cache.state import PLAIN
from kvshrink.store.deflate import deflated, inflated
from kvshrink.store.digest import digest, sealed

NASTY: tuple = (
    *(None, True, False, 0, 1, -1, 2, 3, 31, 2**31, 2**63 - 1, -(2**63), 10**30, 0.5, -0.5, 1e-300, 1e308),
    *(float("nan"), float("inf"), "", "a", "0", "\ud800", "x" * 300, "\x00", "a\nb", "../..", [], {}, [1], [[]]),
    *({"a": 1}, [1, 2, 3], [-1], [2**40, 2**40], "float32", "int8", "uint8", "complex64", "rtn", [0] * 5000),
)
NAMES = (
    "a",
    "0.a",
    "layers.0.pages.columns",
    "layers.0.older.0.records",
    "table.x",
    "9.key_up",
    "layers.x",
    "a\nb",
)  # of tensors that are new
DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int8,
    torch.int32,
    torch.int64,
    torch.uint8,
)
Bytes = bytes | bytearray


def mutate(random: Random, kind: str, paths: list[Path]) -> tuple[str, bool]:
    """Change one of the files. (what was done, whether a digest was made to fit)."""
    path = random.choice(paths)
    if random.random() < 0.4:
        return _damage(random, path), False
    if kind == "artifact":
        return _artifact(random, paths)
    if kind in ("plain", "small"):
        return _cache(random, path, kind == "small")
    if kind == "checkpoint":
        return _checkpoint(random, path)
    return _lines(random, path, kind == "log")


def _damage(random: Random, path: Path) -> str:
    """Bytes changed without a look at what they mean."""
    data, what = (
        bytearray(path.read_bytes()),
        random.choice(("flip", "flip", "head", "cut", "grow", "swap", "zero", "odd")),
    )
    at = random.randrange(len(data))
    if what in ("flip", "head"):
        for _ in range(random.choice((1, 1, 2, 8))):
            data[random.randrange(min(len(data), 400 if what == "head" else 2**40))] ^= 1 << random.randrange(8)
    elif what == "cut":
        del data[at:]
    elif what == "grow":
        data += random.choice((b"\0", b"\n{}", data[:at], bytes(random.randbytes(100)), b"[" * 10**6, b" " * 10**6))
    elif what == "swap":
        size, other = random.randrange(1, 64), random.randrange(len(data))
        data[at : at + size], data[other : other + size] = data[other : other + size], data[at : at + size]
    elif what == "zero":
        data[at : at + random.randrange(1, 5000)] = b""
    else:
        data = bytearray(
            random.choice((b"", b"\xef\xbb\xbf" + data, b"[" * 10**5, b'{"a":' * 10**5, b"\xff" * 99, b"null"))
        )
    path.write_bytes(data)
    return what


def edit(random: Random, value: Any) -> tuple[Any, str]:
    """Plain values with one place changed."""
    place, steps = value, []
    parent, key = None, None
    while isinstance(place, dict | list) and place and (parent is None or random.random() < 0.75):
        parent, key = place, random.choice(list(place)) if isinstance(place, dict) else random.randrange(len(place))
        steps.append(str(key)[:30])
        place = parent[key]
    if parent is None:
        return random.choice(NASTY), "all"
    what = random.choice(("replace", "replace", "replace", "delete", "rename", "double", "deep", "near"))
    if what == "delete":
        del parent[key]
    elif what == "rename" and isinstance(parent, dict):
        parent[random.choice(("", "a", str(key) + "x", f"{key}\n", "0", "00", "-1"))] = parent.pop(key)
    elif what == "double" and isinstance(parent, list):
        parent.insert(random.randrange(len(parent) + 1), place)
    elif what == "deep":
        for _ in range(random.choice((5, 60))):
            place = [place]
        parent[key] = place
    elif what == "near" and isinstance(place, int | float):
        parent[key] = place + random.choice((-1, 1, 32, -32)) if isinstance(place, int) else place * 1.01
    else:
        parent[key] = random.choice(NASTY)
    return value, f"{what} {'.'.join(steps)}"


def change(random: Random, tensors: dict[str, Tensor]) -> str:
    """One or two tensors changed; all are copies."""
    names = sorted(tensors)
    if not names:
        tensors["a"] = torch.zeros(3)
        return "add"
    name, other = random.choice(names), random.choice(names)
    t = tensors[name]
    what = random.choice(
        ("drop", "add", "rename", "flat", "dtype", "swap", "cut", "grow", "fill", "bits", "turn", "order")
    )
    if what == "drop":
        del tensors[name]
    elif what == "add":
        tensors[random.choice((*NAMES, f"{name}x"))] = t
    elif what == "rename":
        others = (f"{name}x", name.replace("0", "1", 1), name.replace("k.", "v."), name[1:])
        tensors[random.choice(others)] = tensors.pop(name)
    elif what == "flat":
        tensors[name] = t.reshape(-1) if random.random() < 0.5 else t[None]
    elif what == "dtype":
        dtype = random.choice(DTYPES)
        tensors[name] = (
            t.to(dtype) if random.random() < 0.5 or t.numel() * t.itemsize % dtype.itemsize else _seen_as(t, dtype)
        )
    elif what == "swap":
        tensors[name], tensors[other] = tensors[other], t
    elif what in ("cut", "grow", "order") and t.dim():
        axis = random.randrange(t.dim())
        if what == "order":
            tensors[name] = t.flip(axis)
        else:
            tensors[name] = (
                t.narrow(axis, 0, random.randrange(t.shape[axis] + 1)) if what == "cut" else torch.cat([t, t], axis)
            )
    elif what == "fill":
        value = random.choice((0, 1, -1, 255, 2**31 - 1, 1e30, float("nan"), float("inf")))
        tensors[name] = torch.full(t.shape, value, dtype=torch.float64).to(t.dtype)
    elif what == "turn" and t.dim() > 1:
        tensors[name] = t.transpose(-1, -2)
    else:
        tensors[name] = _noisy(random, t)
    return f"{what} {name}"


def _seen_as(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.contiguous().view(-1).view(torch.uint8).view(dtype)


def _noisy(random: Random, t: Tensor) -> Tensor:
    """Some bytes of it replaced."""
    flat = t.contiguous().clone().view(-1).view(torch.uint8) if t.numel() else t
    for _ in range(min(flat.numel(), 9)):
        flat[random.randrange(flat.numel())] = random.randrange(256)
    return flat.view(t.dtype).view(t.shape) if t.numel() else t


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as f:
        return {k: f.get_tensor(k).clone() for k in f.keys()}, f.metadata() or {}


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    path.unlink()
    save_file({k: t.clone().contiguous() for k, t in tensors.items()}, path, metadata)


def _text(random: Random, value: Any) -> str:
    """As JSON, now and then with a key twice."""
    text = json.dumps(value)
    return text.replace("{", '{"version": 1, ', 1) if random.random() < 0.03 else text


def _artifact(random: Random, paths: list[Path]) -> tuple[str, bool]:
    description, weights = paths
    data, (tensors, metadata) = json.loads(description.read_text()), _read(weights)
    data.pop("sha256")
    tampered = random.random() < 0.5
    done = change(random, tensors) if tampered else None
    if tampered and random.random() < 0.6:  # an author who knows that shapes are compared
        data["layers"] = {i: {} for i in data["layers"]}
        for name, t in tensors.items():
            data["layers"].setdefault(name.partition(".")[0], {})[name.partition(".")[2]] = list(t.shape)
    if not tampered:
        data, done = edit(random, data)
    hashed = isinstance(data, dict) and random.random() < 0.7
    if isinstance(data, dict):
        data["sha256"] = digest(data, tensors) if hashed else json.loads(description.read_text())["sha256"]
    description.write_text(_text(random, data))
    _write(weights, tensors, metadata)
    return str(done), hashed


def _cache(random: Random, path: Path, small: bool) -> tuple[str, bool]:
    tensors, metadata = _read(path)
    if small and random.random() < 0.4:  # the streams or what is said of them
        if random.random() < 0.5:
            streams, done = edit(random, json.loads(metadata["deflate"]))
            metadata["deflate"] = _text(random, streams)
        else:
            done = change(random, tensors)
        _write(path, tensors, metadata)
        return f"stream: {done}", False
    if small:
        tensors = inflated(tensors, metadata)
    plain = json.loads(bytes(tensors.pop(PLAIN).tolist()))
    sha256 = plain.pop("sha256")
    plain, done = (plain, change(random, tensors)) if random.random() < 0.5 else edit(random, plain)
    hashed = isinstance(plain, dict) and random.random() < 0.7
    if isinstance(plain, dict):
        plain["sha256"] = digest(plain, tensors) if hashed else sha256
    tensors[PLAIN] = torch.tensor(list(_text(random, plain).encode()), dtype=torch.uint8)
    if small:
        tensors, metadata = deflated(tensors)
    _write(path, tensors, metadata)
    return done, hashed


def _checkpoint(random: Random, path: Path) -> tuple[str, bool]:
    tensors, about = _read(path)
    sha256 = about.pop("sha256")
    if random.random() < 0.5:
        done = change(random, tensors)
    else:
        record, done = edit(random, json.loads(about["record"]))
        about["record"] = json.dumps(record)
        if random.random() < 0.2:
            about.pop(random.choice(list(about)))
    hashed = random.random() < 0.5
    _write(path, tensors, about | {"sha256": digest(about, tensors) if hashed else sha256})
    return done, hashed


def _lines(random: Random, path: Path, log: bool) -> tuple[str, bool]:
    """A line of a log, or a plan."""
    lines = path.read_text().splitlines() if log else [path.read_text()]
    at = random.randrange(len(lines))
    value = json.loads(lines[at])
    sha256 = value.pop("sha256")
    value, done = edit(random, value)
    hashed = isinstance(value, dict) and random.random() < 0.7
    if isinstance(value, dict):
        value = sealed(value) if hashed else value | {"sha256": sha256}
    lines[at] = _text(random, value)
    if log and random.random() < 0.1:
        random.shuffle(lines)
    path.write_text("\n".join(lines) + ("\n" if random.random() < 0.8 else ""))
    return done, hashed


def copied(files: list[Path], folder: Path) -> list[Path]:
    """Copies of files in an empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return [Path(shutil.copy(file, folder / file.name)) for file in files]

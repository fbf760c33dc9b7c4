"""Tensors made smaller for a file or a wire, bit for bit: DEFLATE over the byte planes of each (as KVTC does with its
codes, arXiv 2511.01815).

Plane i holds byte i of every number: exponents come together, and compress where a mantissa is noise. A tensor that
does not get smaller stays as it is. The transfer form cannot be attended over: `inflated` gives the resident one back.
"""

import json
import math
import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

from kvshrink.errors import ArtifactError
from kvshrink.store.parse import parsed
from kvshrink.store.reason import line

Kind = tuple[torch.dtype, tuple[int, ...]]  # of a tensor: dtype, shape

LEVEL = 6  # zlib's own default; 9 saves another .02 % of a 4-bit cache
MOST = 1040  # bytes that one of a stream can become: DEFLATE ends at 1032
KEY = "deflate"  # of the metadata: a JSON object {name: [dtype, shape]} of the tensors that are streams


def deflated(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata to keep with them)."""
    out, streams = dict(tensors), {}
    for name, tensor in tensors.items():
        planes = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).view(-1, tensor.dtype.itemsize).T
        stream = zlib.compress(planes.contiguous().numpy().tobytes(), LEVEL)
        if len(stream) < tensor.nbytes:
            out[name] = torch.frombuffer(bytearray(stream), dtype=torch.uint8)
            streams[name] = [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
    return out, {KEY: json.dumps(streams)}


def claimed(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Kind]:
    """{name: (dtype, shape)} of what `inflated` gives, as described. Raises ArtifactError if that cannot be right."""
    found = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    name = "its description"
    try:
        streams = parsed(metadata.get(KEY, "{}"))
        if not isinstance(streams, dict):
            raise ValueError("no object")
        for name, claim in streams.items():
            kind, shape = claim
            stream, dtype = tensors[name], getattr(torch, kind)
            if not isinstance(dtype, torch.dtype) or not all(type(n) is int and n >= 0 for n in shape):
                raise ValueError(f"{kind} {shape}")
            if stream.dtype != torch.uint8 or stream.dim() != 1:
                raise ValueError("no stream of bytes")
            size = math.prod(shape) * dtype.itemsize
            if size > MOST * stream.nbytes:
                raise ValueError(f"{size} bytes from {stream.nbytes}")
            found[name] = (dtype, tuple(shape))
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise damaged(name, error) from error
    return found


def inflated(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], only: Mapping[str, int] | None = None
) -> dict[str, Tensor]:
    """What `deflated` was given; tensors without its metadata as they are. Raises ArtifactError on a damaged stream.

    only: names that are wanted, if they are there, and how many bytes each may have.
    """
    kinds = claimed(tensors, metadata)
    streams = parsed(metadata.get(KEY, "{}"))
    out = {}
    for name in tensors if only is None else [n for n in only if n in tensors]:
        if name not in streams:
            out[name] = tensors[name]
            continue
        dtype, shape = kinds[name]
        size = math.prod(shape) * dtype.itemsize
        try:
            if only is not None and size > only[name]:
                raise ValueError(f"{size} bytes, not up to {only[name]}")
            planes = _inflate(tensors[name], size).view(dtype.itemsize, -1)
            out[name] = planes.T.contiguous().view(-1).view(dtype).view(shape)
        except (zlib.error, ValueError, RuntimeError) as error:
            raise damaged(name, error) from error
    return out


def damaged(name: str, error: Exception) -> ArtifactError:
    return ArtifactError(f"a deflated tensor is damaged ({name}: {line(error)}). Save it again.")


def _inflate(stream: Tensor, size: int) -> Tensor:
    """Exactly `size` bytes, never more in memory, whatever the stream says."""
    inflater = zlib.decompressobj()
    # one more than there may be: the stream's end, and its checksum, is then always reached
    data = inflater.decompress(stream.numpy().data, size + 1)
    if len(data) != size or not inflater.eof:
        raise ValueError(
            f"{len(data)} bytes or more, not {size}" if len(data) > size else f"{len(data)} of {size} bytes"
        )
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if size else torch.empty(0, dtype=torch.uint8)

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

LEVEL = 6  # zlib's own default; 9 saves another .02 % of a 4-bit cache
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


def inflated(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """What `deflated` was given; tensors without its metadata as they are. Raises ArtifactError on a damaged stream."""
    out = dict(tensors)
    if KEY not in metadata:
        return out
    name = "its description"
    try:
        for name, (kind, shape) in json.loads(metadata[KEY]).items():
            dtype: torch.dtype = getattr(torch, kind)
            planes = _inflate(tensors[name], math.prod(shape) * dtype.itemsize).view(dtype.itemsize, -1)
            out[name] = planes.T.contiguous().view(-1).view(dtype).view(shape)
    except (zlib.error, KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise ArtifactError(f"a deflated tensor is damaged ({name}: {_line(error)}). Save it again.") from error
    return out


def _inflate(stream: Tensor, size: int) -> Tensor:
    """Exactly `size` bytes, never more in memory, whatever the stream says."""
    inflater = zlib.decompressobj()
    # one more than there may be: the stream's end, and its checksum, is then always reached
    data = inflater.decompress(stream.numpy().tobytes(), size + 1)
    if len(data) != size or not inflater.eof:
        raise ValueError(
            f"{len(data)} bytes or more, not {size}" if len(data) > size else f"{len(data)} of {size} bytes"
        )
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__

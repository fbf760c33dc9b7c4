"""python -m tests.kernels.guarded: the C++ kernel over inputs that end where memory ends. A read beyond is a crash.

Each record ends there by itself, once with each of its parts as its last.
In a process of its own, for that reason. Prints how many runs went well.
"""

import ctypes
import itertools
import mmap
import os
from collections.abc import Iterator

import numpy as np
import torch

from kvshrink.kernels import inputs
from kvshrink.kernels.decode import Basis, Constant, Live, cpu
from kvshrink.kernels.latents import Packed
from kvshrink.kernels.load import cpu as numbers
from kvshrink.kernels.mass import cpu as columns
from kvshrink.kernels.records import Field, Holder, Layout, Records
from tests.kernels.samples import FORMS, basis_of, packed, turn_of

LIBC = ctypes.CDLL(None, use_errno=True)
WIDTHS = (1, 21, 32, 70)


def at_the_end(tensor: torch.Tensor) -> torch.Tensor:
    """A copy whose last byte is followed by memory that cannot be read."""
    size = tensor.numel() * tensor.itemsize
    room = -(-max(size, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, room + mmap.PAGESIZE)
    first = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert LIBC.mprotect(ctypes.c_void_p(first + room), mmap.PAGESIZE, 0) == 0, os.strerror(ctypes.get_errno())
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=room - size)
    return copy.view(tensor.shape).copy_(tensor)


class Apart(Holder):
    """Records [b, L, p, size] each at the end of memory, less the last bytes of each if it is cut."""

    device = torch.device("cpu")

    def __init__(self, records: torch.Tensor, cut: int = 0) -> None:
        self.shape, size = records.shape[:3], records.shape[3] - cut
        self.held = [at_the_end(record[:size]) for record in records.flatten(0, 2)]

    def bytes_of(self, start: int, stop: int) -> torch.Tensor:
        return torch.stack(self.held).unflatten(0, self.shape)[:, :, start:stop]

    def addresses(self, start: int, stop: int) -> np.ndarray:
        table = np.array([record.data_ptr() for record in self.held], np.int64).reshape(self.shape)
        return np.ascontiguousarray(table[:, :, start:stop])


def at_the_end_each(pages: Packed, lanes: int, cut: int = 0) -> Iterator[Packed]:
    """The same pages, once with each part as the last of its record, which ends with it, less the last bytes if cut."""
    tensors = dict(pages.stored)
    for last in tensors:
        plain = Layout.of({name: t for name, t in tensors.items() if name != last}, lanes)
        end = Layout.of({last: tensors[last]}, lanes).fields[last]
        at = -(-plain.size // end.dtype.itemsize) * end.dtype.itemsize
        layout = Layout({**plain.fields, last: Field(end.dtype, end.shape, at)}, at + end.nbytes, lanes)
        b, p = tensors[last].shape[:2]
        wide = torch.zeros(b, lanes, p, -(-layout.size // 8) * 8, dtype=torch.uint8)  # which views of it need
        layout.write(wide, tensors)
        yield pages._replace(stored=Records(Apart(wide[..., : layout.size], cut), layout, 0, p))


def guarded(x):
    """The same with all tensors at the end of memory."""
    if isinstance(x, torch.Tensor):
        return at_the_end(x)
    if isinstance(x, Basis):
        return Basis(guarded(x.up), guarded(x.mean))
    return type(x)(*map(guarded, x)) if hasattr(x, "_fields") and not isinstance(x, Packed) else x


def run(form, width: int, dtype: torch.dtype) -> int:
    """Keys that are rebuilt and turned, and keys that are not; both under a mask. How many runs."""
    keys, values = packed(form, 2, width, 2, 2, dtype, 16), packed(form, 2, width, 2, 2, dtype, 20)
    visible = torch.rand(2, 1, 1, 64) > 0.2
    basis, turn, runs = basis_of(2, width, 4, 20), turn_of(64, 20, part=0.8), 0
    for lanes in (1, 2):
        live = Live(torch.randint(0, 33, (2, lanes, 2), dtype=torch.uint8), torch.tensor([40, 0]).int())
        for k, v in zip(at_the_end_each(keys, lanes), at_the_end_each(values, lanes), strict=True):
            cpu.decode(
                *map(guarded, (torch.randn(2, 4, 3, 20), k, basis, turn, v, visible)), None, dtype, guarded(live)
            )
            cpu.decode(*map(guarded, (torch.randn(2, 4, 3, width), k, None, None, v, visible)), 5.0, dtype)
            common = Constant(guarded(torch.randn(2, 4, 3, 20)), guarded(torch.randn(4, 20)), guarded(turn))
            given = map(guarded, (torch.randn(2, 4, 3, width), k, None, None, v, visible))
            cpu.decode(*given, None, dtype, guarded(live), common)
            if numbers.fits(k):
                numbers.load(k)
            runs += 3
    return runs


def masses() -> int:
    """Tiles of scores that end there, whole vectors and parts of one. How many runs."""
    real, runs = columns.scored, 0

    def ended(*given):
        for *place, scores in real(*given):
            yield *place, at_the_end(scores)

    columns.scored = ended
    for t, dtype in itertools.product((1, 15, 16, 17, 40), (torch.float32, torch.bfloat16, torch.float16)):
        queries, keys = torch.randn(2, 2, 3, t, 16), torch.randn(2, 2, t, 16).to(dtype)
        there = torch.rand(2, t) > 0.3
        for given in ((None, None, None), (torch.rand(t), there, there)):
            columns.mass(queries, keys, torch.arange(t) + 1, *given)
            runs += 1
    columns.scored = real
    return runs


def crashes_beyond(pages: Packed) -> bool:
    """Whether reading beyond these, which were not refused, is noticed at all."""
    child = os.fork()
    if child == 0:
        os.close(2)
        inputs.check = lambda *_: 1
        cpu.decode(torch.randn(1, 1, 1, 16), pages, None, None, pages, None, None, torch.float32)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    whole = packed(("token", 4), 1, 16, 1, 1, torch.float32)
    assert not any(crashes_beyond(pages) for pages in at_the_end_each(whole, 1))
    assert all(crashes_beyond(pages) for pages in at_the_end_each(whole, 1, cut=1))
    jobs = list(itertools.product(FORMS, WIDTHS, (torch.float32, torch.bfloat16)))
    print(sum(run(*job) for job in jobs) + masses(), "runs")

"""python -m tests.kernels.guarded: the C++ kernel over inputs that end where memory ends. A read beyond is a crash.

In a process of its own, for that reason. Prints how many runs went well.
"""

import ctypes
import itertools
import mmap
import os

import torch

from kvshrink.kernels import inputs
from kvshrink.kernels.decode import Basis, cpu
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


def guarded(x):
    """The same with all tensors at the end of memory."""
    if isinstance(x, torch.Tensor):
        return at_the_end(x)
    if isinstance(x, dict):
        return {name: guarded(tensor) for name, tensor in x.items()}
    if isinstance(x, Basis):
        return Basis(guarded(x.up), guarded(x.mean))
    return type(x)(*map(guarded, x)) if hasattr(x, "_fields") else x


def run(form, width: int, dtype: torch.dtype) -> None:
    """Keys that are rebuilt and turned, and keys that are not; both under a mask."""
    keys, values = packed(form, 2, width, 2, 2, dtype, 16), packed(form, 1, width, 2, 2, dtype, 20)
    visible = torch.rand(2, 1, 1, 64) > 0.2
    job = torch.randn(2, 4, 3, 20), keys, basis_of(2, width, 4, 20), turn_of(64, 20, part=0.8), values, visible
    cpu.decode(*map(guarded, job), None, dtype)
    cpu.decode(*map(guarded, (torch.randn(2, 4, 3, width), keys, None, None, values, visible)), 5.0, dtype)


def crashes_beyond() -> bool:
    """Whether a page that is a byte too short, and was not refused, is noticed at all."""
    child = os.fork()
    if child == 0:
        os.close(2)
        keys = packed(("channel", 4), 1, 16, 1, 1, torch.float32)
        short = guarded(keys.stored["codes"][..., :-1])
        inputs.check = lambda *_: 1
        keys = keys._replace(stored={**keys.stored, "codes": short})
        cpu.decode(torch.randn(1, 1, 1, 16), keys, None, None, keys, None, None, torch.float32)
        os._exit(0)
    return os.waitpid(child, 0)[1] != 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert crashes_beyond()
    jobs = list(itertools.product(FORMS, WIDTHS, (torch.float32, torch.bfloat16)))
    for job in jobs:
        run(*job)
    print(2 * len(jobs), "runs")

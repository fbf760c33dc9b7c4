"""Compiles the programs of kernels/decode/triton.py for a GPU of compute capability 9.0, on a machine without one.

Run as a script, in a process whose triton does not interpret. numpy accepts programs that the compiler refuses.
"""

import torch
import triton
from triton.backends.compiler import GPUTarget

from kvshrink.kernels.decode import triton as launcher
from tests.kernels.samples import basis_of, packed, turn_of

MOST_SHARED = 227 * 1024  # bytes that a program may have there
made = []


class NoGPU:
    """As much of a driver as compiling asks for."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


class Compiled:
    """Takes a program's place: compiles instead of running."""

    def __init__(self, program, **config):
        self.program, self.config = program, config

    def __getitem__(self, grid):
        return lambda *args, **named: made.append(self.program.warmup(*args, grid=grid, **self.config, **named))


def main():
    triton.runtime.driver.set_active(NoGPU())
    launcher._tuned = Compiled(launcher.attend, **launcher.CONFIGS[2].all_kwargs())
    launcher.join = Compiled(launcher.join)
    bf16, fp32 = torch.bfloat16, torch.float32
    some = torch.ones(1, 1, 1, 32 * 9, dtype=torch.bool)
    for key, value, width, basis, turn, visible, softcap, dtype in [
        (("channel", 4), ("token", 4), 128, True, turn_of(288, 128), some, None, bf16),
        (("token", 3), "raw", 48, True, None, None, 5.0, fp32),
        (("channel", 8), "normal", 320, True, turn_of(288, 128, part=0.5, interleaved=True), None, None, bf16),
        ("normal", ("channel", 1), 64, False, None, some, None, bf16),
    ]:
        keys, values = packed(key, 1, width, 9, 1, dtype), packed(value, 1, 60, 9, 1, dtype)
        query = torch.randn(1, 2, 4, 128 if basis else width)
        launcher.decode(
            query, keys, basis_of(1, width, 2, 128) if basis else None, turn, values, visible, softcap, dtype
        )
        attend, join = made[-2:]
        assert attend.metadata.shared <= MOST_SHARED
        # products of bfloat16 must run on tensor cores
        assert ("mma" in attend.asm["ptx"]) == (dtype == bf16)
        assert "st.global" in join.asm["ptx"]


if __name__ == "__main__":
    main()

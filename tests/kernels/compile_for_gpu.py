"""Compiles the programs of kernels/decode/triton.py for a GPU of compute capability 9.0, on a machine without one.

Run as a script, in a process whose triton does not interpret. numpy accepts programs that the compiler refuses.
"""

from dataclasses import replace

import torch
import triton
from triton.backends.compiler import GPUTarget

from kvshrink.kernels.decode import ALL, Constant, Live
from kvshrink.kernels.decode import triton as launcher
from kvshrink.kernels.mass import triton as of_keys
from tests.kernels.samples import basis_of, packed, strewn, turn_of

MOST_SHARED = 227 * 1024  # bytes that a program may have there
COUNTS = torch.full((1, 1, 40), 32, dtype=torch.uint8)
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
    some, live = torch.ones(1, 1, 1, 32 * 9, dtype=torch.bool), Live(COUNTS[..., :9], torch.zeros(1).int())
    for key, value, width, basis, turn, visible, softcap, dtype, slots in [
        (("channel", 4), ("token", 4), 128, True, turn_of(288, 128), some, None, bf16, ALL),
        (("token", 3), "raw", 48, True, None, None, 5.0, fp32, live),
        (("channel", 8), "normal", 320, True, turn_of(288, 128, part=0.5, interleaved=True), None, None, bf16, live),
        ("trellis", ("table", 1), 64, False, None, some, None, bf16, Live(COUNTS[..., :9])),
    ]:
        keys, values = packed(key, 1, width, 9, 1, dtype), packed(value, 1, 60, 9, 1, dtype)
        query = torch.randn(1, 2, 4, 128 if basis else width)
        up = basis_of(1, width, 2, 128) if basis else None
        common = None if basis else Constant(torch.randn(1, 2, 4, 128), torch.randn(2, 128), turn_of(288, 128))
        launcher.decode(query, keys, up, turn, values, visible, softcap, dtype, slots, common)
        attend, join = made[-2:]
        assert attend.metadata.shared <= MOST_SHARED
        # products of bfloat16 must run on tensor cores
        assert ("mma" in attend.asm["ptx"]) == (dtype == bf16)
        assert "st.global" in join.asm["ptx"]
        assert "cp.async" in attend.asm["ptx"]  # a tile is read while another is worked on
    grown()
    masses()


def grown():
    """A longer sequence, and a part of it that begins at any page, take the program that was compiled."""
    bf16, programs = torch.bfloat16, []
    keys, values = packed(("channel", 4), 2, 128, 40, 1, bf16), packed(("token", 4), 2, 128, 40, 1, bf16)
    keys, values = strewn(keys, values, 1)
    basis = basis_of(2, 128, 2, 128)
    for start, stop in ((0, 40), (1, 10), (3, 40)):
        part = [side._replace(stored=replace(side.stored, start=start, stop=stop)) for side in (keys, values)]
        tokens = (stop - start) * 32
        live = Live(COUNTS[..., start:stop], torch.zeros(3).int()[start % 2 :][:1])
        visible, turn = torch.ones(1, 1, 1, tokens, dtype=torch.bool), turn_of(tokens + start, 128)
        turn = turn._replace(positions=turn.positions[:, start:])
        launcher.decode(torch.randn(1, 2, 4, 128), part[0], basis, turn, part[1], visible, None, bf16, live)
        programs.append(made[-2])
    assert all(program is programs[0] for program in programs)
    # codes are read 16 bytes at a time, though their addresses come from a table
    assert "cp.async.cg.shared.global" in programs[0].asm["ptx"]


def masses():
    """What keys get of many queries."""
    of_keys.sums, of_keys.columns = Compiled(of_keys.sums), Compiled(of_keys.columns)
    real = torch.ones(1, 300, dtype=torch.bool)
    for d, dtype, there in ((128, torch.bfloat16, None), (96, torch.float32, real), (256, torch.float16, None)):
        queries, keys = torch.randn(1, 2, 4, 300, d), torch.randn(1, 2, 300, d, dtype=dtype)
        of_keys.mass(queries, keys, torch.arange(300) + 1, None, there, there, most=there is not None)
        for program in made[-2:]:
            assert program.metadata.shared <= MOST_SHARED
            assert ("mma" in program.asm["ptx"]) == (dtype != torch.float32)


if __name__ == "__main__":
    main()

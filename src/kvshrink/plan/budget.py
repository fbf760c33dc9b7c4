"""What a plan must keep to: bytes for so many tokens of so many sequences, or a KL, and the time of a step."""

import re
from dataclasses import dataclass

from kvshrink.attach.budget import CacheBudget
from kvshrink.errors import SettingError

MOST = 2**63  # bytes
POWERS = {letter: n + 1 for n, letter in enumerate("KMGT")}
UNITS = {"": 1, "B": 1} | {f"{x}{b}": 1000**n for x, n in POWERS.items() for b in ("", "B")}
UNITS |= {f"{x}I{b}": 1024**n for x, n in POWERS.items() for b in ("", "B")}


@dataclass(frozen=True)
class Budget:
    """asked: as given, {"byte_ratio": 0.0625}. nbytes: of one sequence, or None where `kl` (nats) is the limit.
    step_time: the most that a decoding step may take, in that of the full cache's; None: as long as it likes."""

    asked: dict
    tokens: int
    batch: int
    nbytes: int | None = None
    kl: float | None = None
    step_time: float | None = None

    @property
    def described(self) -> dict:
        """As plan.json has it."""
        timed = {} if self.step_time is None else {"step_time": self.step_time}
        return {**self.asked, **timed, "tokens": self.tokens, "batch": self.batch}


def budget(
    sizes: CacheBudget,
    batch: int,
    byte_ratio: float | None = None,
    memory: str | None = None,
    kl: float | None = None,
    step_time: float | None = None,
) -> Budget:
    """A budget from exactly one of the first three. Raises SettingError on none, two, or a number that cannot be."""
    asked = {k: v for k, v in {"byte_ratio": byte_ratio, "memory": memory, "kl": kl}.items() if v is not None}
    if len(asked) != 1:
        given = ", ".join(f"--{k.replace('_', '-')}" for k in asked) or "none"
        raise SettingError(f"a plan has exactly one budget, not {given}. Give --byte-ratio, --memory or --kl.")
    if batch < 1:
        raise SettingError(f"batch={batch} is not possible. Use 1 sequence or more.")
    if step_time is not None and not 0 < step_time < float("inf"):
        raise SettingError(f"step_time={step_time} is not possible. Use 1 for the full cache's time, or more.")
    if kl is not None:
        if not 0 < kl < float("inf"):
            raise SettingError(f"kl={kl} is not possible. Use nats above 0, such as 0.01.")
        return Budget(asked, sizes.tokens, batch, kl=kl, step_time=step_time)
    if byte_ratio is not None:
        if not 0 < byte_ratio <= 1:
            raise SettingError(f"byte_ratio={byte_ratio} is not possible. Use a share of bytes above 0, up to 1.")
        nbytes = int(byte_ratio * sizes.full)
    else:
        nbytes = parse_bytes(str(memory)) // batch
    return Budget(asked, sizes.tokens, batch, nbytes=nbytes, step_time=step_time)


def parse_bytes(text: str) -> int:
    """ "64MiB", "20 GiB", "1.5GB" or "1000000" as bytes. Raises SettingError on anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([A-Za-z]*)\s*", text)
    unit = found and UNITS.get(found[2].upper())
    if not found or not unit or not 0 < float(found[1]) * unit < MOST:
        raise SettingError(f"{text!r} are no bytes. Write a number and KiB, MiB or GiB, such as 64MiB.")
    return int(float(found[1]) * unit)

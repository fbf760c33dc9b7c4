"""What one model is told from another by: its settings, and some numbers of each of its weights.

The same in float32, bfloat16 and float16: numbers are compared within what rounding between these can move them. A hash
of rounded numbers would not do, since some lie where they round either way. What changes a weight by a small part of
its size still shows: of a matrix with such a change a few of the numbers kept are near 0, and are moved far.
"""

import base64
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from kvshrink.errors import ArtifactError

ROUNDING = 2.0**-8  # of a number: the last digit of bfloat16
ALLOWANCE = 2.0**-16  # of a tensor's root mean square: what merging and unmerging an adapter leaves in float32
LEAST, MOST = 2.0**-24, 65504.0  # of float16's numbers
SHOWN = 60  # characters of a setting in a message


@dataclass(frozen=True)
class Identity:
    """settings: plain values by name. weights: a `sketch` of every tensor, by its name in the decoder.

    digest: hash of the settings and of more numbers of every tensor as they are, which depends on the dtype.
    """

    settings: Mapping[str, Any]
    weights: Mapping[str, str]
    digest: str

    def to_dict(self) -> dict:
        """As JSON holds it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: object) -> "Identity":
        """What `to_dict` gave. Raises ValueError on anything else."""
        if not isinstance(data, dict) or set(data) != {"settings", "weights", "digest"}:
            raise ValueError("it is no identity of a model")
        settings, weights, digest = data["settings"], data["weights"], data["digest"]
        if not (isinstance(settings, dict) and isinstance(weights, dict) and isinstance(digest, str)):
            raise ValueError("an identity of a model has parts of the wrong types")
        for text in weights.values():
            _read(text)
        return cls(settings, weights, digest)

    def difference(self, other: "Identity") -> str | None:
        """How the other model differs from this one, in a few words; None: it is the same.

        A setting that only one of them has is of another version of transformers, and is not compared.
        """
        for name in self.settings.keys() & other.settings.keys():
            ours, theirs = self.settings[name], other.settings[name]
            if ours != theirs:
                return f"{name} is {_short(theirs)}, not {_short(ours)}"
        mine, its = self.weights.keys(), other.weights.keys()
        if mine != its:
            more = len(its - mine), len(mine - its)
            return f"it has {more[0]} other weights and lacks {more[1]} ({min(mine ^ its)})"
        wrong = [name for name in mine if not alike(self.weights[name], other.weights[name])]
        if not wrong:
            return None
        return f"{len(wrong)} of {len(mine)} weights have other numbers ({wrong[0]})"


def difference(saved: object, model: Identity, what: str) -> str | None:
    """How a model differs from the one that a file was made with; None: it is that one.

    Raises ArtifactError if the file, called `what`, does not say.
    """
    try:
        made_with = Identity.from_dict(saved)
    except ValueError as error:
        raise ArtifactError(
            f"{what} does not say which model it is of ({error}): it is edited, or of an earlier version of kvshrink. "
            "Make it again."
        ) from error
    return made_with.difference(model)


def sketch(dtype: str, shape: tuple[int, ...], numbers: np.ndarray) -> str:
    """Some numbers of a tensor as text; of one that holds integers, bytes of it."""
    kind, plain = ("f", "<f4") if numbers.dtype.kind == "f" else ("u", "u1")
    size = "x".join(map(str, shape)) or "1"
    return f"{dtype} {size} {kind}{base64.b64encode(numbers.astype(plain).tobytes()).decode()}"


def alike(ours: str, theirs: str) -> bool:
    """Whether two sketches are of one tensor, as far as can be told."""
    (one, size_a, a), (two, size_b, b) = _read(ours), _read(theirs)
    if size_a != size_b or a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.dtype.kind != "f":
        return one == two and bool((a == b).all())
    if not a.size:
        return True
    a, b = (np.clip(x.astype(np.float64), -MOST, MOST) for x in (a, b))
    most = np.maximum(np.abs(a), np.abs(b))
    size = np.sqrt(np.square(np.nan_to_num(most)).mean())
    near = np.abs(a - b) <= ROUNDING * most + ALLOWANCE * size + LEAST
    return bool((near | (np.isnan(a) & np.isnan(b))).all())


def _read(text: object) -> tuple[str, str, np.ndarray]:
    """(dtype, size, numbers) of a sketch. Raises ValueError on other text."""
    parts = text.split(" ") if isinstance(text, str) else []
    if len(parts) != 3 or parts[2][:1] not in ("f", "u"):
        raise ValueError("a weight's sketch is not as it was written")
    raw = base64.b64decode(parts[2][1:], validate=True)
    return parts[0], parts[1], np.frombuffer(raw, "<f4" if parts[2][0] == "f" else "u1")


def _short(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= SHOWN else text[: SHOWN - 2] + ".."

"""What a codec makes of rows, without a cache: for fitting and for simulated scores.

There are no queries here, so all tokens count as equally important.
"""

import torch
from torch import Tensor

from kvshrink.cache.rope import Rope, as_stored, as_used
from kvshrink.errors import SettingError
from kvshrink.methods._roles import Codec
from kvshrink.shapes import Float


def round_trip(
    codec: Codec,
    rows: Float[Tensor, "b h t d"],
    rope: Rope | None,
    page: int,
    first: int = 0,
    reach: int | None = None,
) -> Float[Tensor, "b h t d"]:
    """Rows of the positions from `first` on, encoded in whole pages and decoded. Keys are as attention uses them.
    reach: tokens of the step that turned them, which may be more; None: it ends with these rows.

    Raises SettingError for a codec that needs keys and values at once.
    """
    if codec.joint:
        raise SettingError("keys and values are stored as one, and neither by itself. Measure with a cache instead.")
    b, h, t, _ = rows.shape
    positions = torch.arange(first, first + t, device=rows.device)[None].expand(b, -1)
    positions = positions if rope is None else rope.of_prompt(positions, first + t if reach is None else reach)
    out = as_stored(codec, rows, positions, rope)
    spare = -t % page
    valid = None
    if spare:
        out = torch.nn.functional.pad(out, (0, 0, 0, spare))
        valid = (torch.arange(t + spare, device=rows.device) < t)[None].expand(b, -1)
    out = codec.decode(codec.encode(out, valid), h)[:, :, :t]
    return as_used(codec, out, positions, rope).to(rows.dtype)

"""Shape annotations such as `Float[Tensor, "b h t d"]`: checked in tests, plain tensors everywhere else.

Letters are fixed for the whole project: b batch, h KV heads, q query heads, t stored tokens, s new tokens, d head dim,
r rank, g group, p pages, n = h * d. jaxtyping is a test dependency only, so its absence must change nothing.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, UInt8
else:
    try:
        from jaxtyping import Bool, Float, Int, UInt8
    except ImportError:

        class _Plain:
            def __class_getitem__(cls, item):
                return item[0]

        Bool = Float = Int = UInt8 = _Plain

__all__ = ["Bool", "Float", "Int", "UInt8"]

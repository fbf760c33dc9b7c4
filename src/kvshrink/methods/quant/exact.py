"""The baseline of speed: the full cache in our pages. Nothing is lost, no byte is saved, no step copies what is held.

`DynamicCache` joins all keys and values anew for each token; here a token joins the window and a full page stays where
it is, shared by forks, and the fused kernels read it in place. In the model's own dtype, keys after RoPE.
"""

from dataclasses import dataclass
from typing import ClassVar, final

from kvshrink.methods._codecs.headwise import HeadwiseCodec
from kvshrink.methods._packing import Raw
from kvshrink.methods._roles import Codec, Fitted, Method
from kvshrink.methods._stats import LayerShape


@final
@dataclass(frozen=True)
class Full(Method):
    """Every key and value as it is."""

    sinks: int = 0  # all tokens are exact

    two_widths: ClassVar[bool] = True

    def codecs(self, shape: LayerShape, fitted: Fitted) -> tuple[Codec, Codec]:
        keys, values = (Raw(shape.heads, d, self.page, shape.dtype) for d in (shape.head_dim, shape.value_dim))
        return HeadwiseCodec("k_post", keys), HeadwiseCodec("v", values)


METHOD = Full

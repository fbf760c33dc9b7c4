"""Who hears what attention is called with: a full cache may give keys that carry a listener."""

from typing import Any

from torch import Tensor

LISTENER = (
    "_kvshrink_listener"  # the attribute of a key tensor: called with queries, keys, scale, soft cap and sinks' logits
)


def tell(query: Tensor, key: Tensor, scaling: float | None, softcap: float | None, sinks: Tensor | None) -> None:
    """Call the listener of these keys, if they have one."""
    listener: Any = getattr(key, LISTENER, None)
    if listener is not None:
        listener(query, key, query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, sinks)

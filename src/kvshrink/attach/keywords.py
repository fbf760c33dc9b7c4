"""What a model's attention hands over besides queries, keys, values and mask: each keyword is known, or is refused.

An implementation that ignores a keyword gives wrong tokens in silence, as sinks ("s_aux") would.
"""

from collections.abc import Mapping
from typing import Any

from kvshrink.errors import CacheError

HARMLESS = {
    "sliding_window",  # the mask holds it
    "position_ids",  # keys and queries have RoPE applied already
    "cache_position",
    "use_cache",
    "return_dict",
    "output_hidden_states",
    "output_router_logits",
    "num_items_in_batch",  # of the loss
    "logits_to_keep",
}


HONOURED = {"s_aux"}  # sinks as logits, over a cache of ours


def plain(keywords: Mapping[str, Any]) -> bool:
    """Whether they ask nothing of attention that ours does not do."""
    return not any(_matters(name, value) for name, value in keywords.items())


def check_keywords(keywords: Mapping[str, Any], kind: str, by_module: bool = True) -> None:
    """Raise CacheError if attention over a cache of ours could not honour them. by_module: or a caller's own."""
    known = HONOURED if by_module else set()
    names = sorted(name for name, value in keywords.items() if _matters(name, value) and name not in known)
    if not names:
        return
    if "output_attentions" in names:
        raise CacheError("attention weights are never formed over a shrunken cache. Use output_attentions=False.")
    raise CacheError(
        f"{kind} passes {', '.join(names)} to attention, which is not known over a shrunken cache. "
        "Leave it out, or use the model with transformers' DynamicCache."
    )


def _matters(name: str, value: Any) -> bool:
    if value is None or name in HARMLESS:
        return False
    if name == "is_causal":  # without a mask we are causal
        return not value
    return bool(value) if name == "output_attentions" else True

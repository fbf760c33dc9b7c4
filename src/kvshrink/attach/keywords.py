"""What a model's attention hands over besides queries, keys, values and mask: each keyword is known, or is refused.

An implementation that ignores a keyword gives wrong tokens in silence, as sinks ("s_aux") would.
"""

from collections.abc import Mapping
from typing import Any

from kvshrink.errors import CacheError

HARMLESS = {
    "sliding_window",  # the mask holds it
    "position_ids",  # keys and queries are turned already
    "cache_position",
    "use_cache",
    "return_dict",
    "output_hidden_states",
    "output_router_logits",
    "num_items_in_batch",  # of the loss
    "logits_to_keep",
}


def unknown(keywords: Mapping[str, Any]) -> list[str]:
    """Names of keywords that say something about attention that ours does not do."""
    return sorted(name for name, value in keywords.items() if value is not None and _matters(name, value))


def check_keywords(keywords: Mapping[str, Any], kind: str) -> None:
    """Raise CacheError if attention over a cache of ours could not honour them."""
    if not (names := unknown(keywords)):
        return
    if "output_attentions" in names:
        raise CacheError("attention weights are never formed over a shrunken cache. Use output_attentions=False.")
    raise CacheError(
        f"{kind} passes {', '.join(names)} to attention, which is not known over a shrunken cache. "
        "Leave it out, or use the model with transformers' DynamicCache."
    )


def _matters(name: str, value: Any) -> bool:
    if name == "is_causal":  # without a mask we are causal
        return not value
    if name == "output_attentions":
        return bool(value)
    return name not in HARMLESS

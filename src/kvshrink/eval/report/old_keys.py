"""Results that were written before the share of a full cache's bytes was called byte_ratio: it was `kept`."""

from typing import Any

NOW = {
    "kept": "byte_ratio",
    "kept_later": "byte_ratio_later",
    "kept_answers": "byte_ratio_answers",
    "next_kept": "next_byte_ratio",
}


def renamed(data: Any) -> Any:
    """The same values under the keys of today. A text under `kept` is no share of bytes and stays."""
    if isinstance(data, dict):
        return {k if isinstance(v, str) else NOW.get(k, k): renamed(v) for k, v in data.items()}
    return [renamed(x) for x in data] if isinstance(data, list) else data

"""What an lm-evaluation-harness run really read and held: without it, a score may be the uncompressed model's."""

from dataclasses import dataclass

from kvshrink.cache import KVCache
from kvshrink.errors import EvalError


@dataclass
class Usage:
    """Counts of one task. A sequence is one continuation, one generation, or one window of a rolling text.

    read: sequences, and tokens, whose prediction read a token that the cache holds compressed, or dropped.
    held, full: bytes at the end of each sequence, added up, and those of full caches for the same tokens.
    """

    sequences: int = 0
    sequences_read: int = 0
    tokens: int = 0
    tokens_read: int = 0
    held: int = 0
    full: int = 0

    def add(self, steps: list[tuple[int, bool]], cache: KVCache) -> None:
        """Enter a finished sequence: for each step the tokens it predicted, and whether it read compressed ones."""
        read = sum(n for n, shrunken in steps if shrunken)
        self.sequences += 1
        self.sequences_read += read > 0
        self.tokens += sum(n for n, _ in steps)
        self.tokens_read += read
        report = cache.report()
        self.held += report.nbytes
        self.full += report.full

    def to_dict(self) -> dict:
        """Plain values, for JSON: shares of sequences and tokens that read compressed ones, and of full bytes."""
        return {
            "sequences": self.sequences,
            "sequences_reading_compressed": self.sequences_read / max(1, self.sequences),
            "tokens": self.tokens,
            "tokens_reading_compressed": self.tokens_read / max(1, self.tokens),
            "bytes": self.held,
            "full_bytes": self.full,
            "byte_ratio": self.held / max(1, self.full),
        }


def describe(tasks: dict[str, Usage]) -> dict[str, dict]:
    """The counts of a run. Raises EvalError if none of its requests read a compressed token."""
    if tasks and not any(u.sequences_read for u in tasks.values()):
        raise EvalError(
            f"none of {sum(u.sequences for u in tasks.values())} requests was long enough to read a compressed token: "
            "these scores are the uncompressed model's. Use longer contexts (--num_fewshot) or a smaller window."
        )
    return {name: u.to_dict() for name, u in tasks.items()}

"""The word lists of wonderwords (PyPI, MIT), from which RULER draws its words."""

from functools import cache
from random import Random

from kvshrink.errors import EvalError


@cache
def words(*kinds: str) -> tuple[str, ...]:
    """The distinct words of these kinds ("noun", "adjective", "verb"), sorted. Raises EvalError without wonderwords."""
    try:
        from wonderwords import RandomWord
    except ImportError as error:
        raise EvalError("ruler: its words need wonderwords. Run pip install 'kvshrink[eval]'.") from error
    return tuple(RandomWord(enhanced_prefixes=False).filter(include_categories=kinds))


def pair(random: Random) -> str:
    """ "adjective-noun", each pair as likely as any other."""
    return f"{random.choice(words('adjective'))}-{random.choice(words('noun'))}"

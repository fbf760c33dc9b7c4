"""KVzip: a model reads the prompt again, and what it looks at to repeat it stays. arXiv 2505.23416

Importance is the most attention that any query of the repetition gives a token (attach/judging.py): it depends on no
question, so that one prompt serves many. All tokens of all layers and heads compete, and the best `ratio` stay.
per="head" ranks heads alone: the most important ones keep everything, the others nothing but sinks and window.

A prompt takes about three times as long. What is decoded stays, and so do steps of fewer than 32
tokens; the next prompt is judged by itself.

Departures: no request to repeat stands before the repetition, since the cache knows no tokenizer; a head keeps whole
pages of 32 tokens, so that the sum over all heads is the budget's.
"""

from dataclasses import dataclass
from typing import final

from kvshrink.methods._reading_again import ReadingAgain


@final
@dataclass(frozen=True)
class KVzip(ReadingAgain):
    """`ratio` of a prompt's tokens behind the window, over all layers and heads. per: whose tokens compete: of the
    whole "model", of each "layer"; "head": heads do, as wholes; "even": all heads keep as many, of all tokens so
    far."""


METHOD = KVzip

"""What every method is that holds no more than so many tokens."""

from abc import abstractmethod

from kvshrink.methods._roles import Method
from kvshrink.methods._stats import LayerShape


class Bounded(Method):
    """A method that holds no more tokens however long a text is, and so can be given another one's bytes."""

    @classmethod
    @abstractmethod
    def within(cls, held_bytes: float, shape: LayerShape) -> "Bounded":
        """The method that holds the most within so many bytes of a layer. Raises SettingError if none does."""

"""Errors a caller can act on. Every message says what was wrong, the numbers, and the remedy, on one line."""


class KVShrinkError(Exception):
    """Base of every error that kvshrink raises on purpose; the command line prints it and exits with code 2."""

    def __init__(self, message: object = "") -> None:
        super().__init__(" ".join(str(message).splitlines()))  # names and values from files may hold line ends


class SettingError(KVShrinkError, ValueError):
    """A setting is unknown, out of range, or does not fit the model's shapes."""


class UnsupportedModelError(KVShrinkError):
    """The model has an attention or a position encoding that kvshrink refuses to guess about."""


class CacheError(KVShrinkError):
    """A cache is used in a way that would give wrong tokens: another model, no attach, a mask of the wrong width."""


class ArtifactError(KVShrinkError):
    """A saved file is missing, truncated, edited, of another version, or made for another model."""


class DataError(KVShrinkError, ValueError):
    """Calibration or evaluation text is empty, too short, or not finite."""


class EvalError(KVShrinkError):
    """An evaluation case file or task setting cannot be used."""

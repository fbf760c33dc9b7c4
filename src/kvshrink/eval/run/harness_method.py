"""The arguments of lm-eval's model `kvshrink` that say which method, and on what text it is fitted."""

from kvshrink.errors import EvalError, SettingError
from kvshrink.eval.run.entries import parse
from kvshrink.methods._roles import Method
from kvshrink.methods.artifact import Artifact


def method_of(
    given: str | Method | Artifact | None, artifact: str | None, keep: float | None, bits: int | None, text: str | None
) -> Method | Artifact:
    """The method of the model arguments, not yet fitted. Raises SettingError on arguments that would be ignored."""
    defaults = {k: v for k, v in (("keep", keep), ("bits", bits)) if v is not None}
    if artifact is not None:
        if given is not None or defaults or text is not None:
            raise SettingError(f"method, keep, bits and text cannot change the artifact {artifact}. Leave them out.")
        return Artifact.from_pretrained(artifact)
    if given is None:
        raise EvalError("no method. Give --model_args 'pretrained=...,method=cskv:keep=0.2;bits=4' or artifact=FOLDER.")
    if not isinstance(given, str):
        if defaults:
            raise SettingError("keep and bits cannot change a method that is made already. Leave them out.")
        return given
    entry = parse(given.replace(";", ","), defaults)
    if entry.method is None or entry.like is not None:
        raise EvalError(
            f"{given!r} is not a method of its own. For the full cache use --model hf, or method=rtn:bits=None."
        )
    return entry.method

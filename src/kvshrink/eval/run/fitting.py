"""Fit whatever a comparison needs, in one pass over the text; with a folder, what was fitted before is read from it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvshrink.attach.identity import model_key
from kvshrink.errors import ArtifactError
from kvshrink.eval.run.entries import Entry
from kvshrink.fit.job import fit_all
from kvshrink.fit.resume import clear
from kvshrink.methods import name_of
from kvshrink.methods._roles import Method
from kvshrink.methods.artifact import Artifact
from kvshrink.methods.artifact_file import CONFIG
from kvshrink.store.log import key_of

BATCH = 4  # calibration rows per forward pass
UNFINISHED = ".unfinished"


def fitted(
    entries: Sequence[Entry], model: Any, tokenizer, texts: Sequence[str], folder: Path | None = None
) -> list[Entry]:
    """The entries with every method that needs it fitted. With a folder an interrupted fit goes on where it was."""
    methods = {e.method: None for e in entries if isinstance(e.method, Method) and e.method.needs_fit}
    made = _fit(list(methods), model, tokenizer, texts, folder)
    return [replace(e, method=made.get(e.method, e.method)) if isinstance(e.method, Method) else e for e in entries]


def _fit(
    methods: list[Method], model: Any, tokenizer, texts: Sequence[str], folder: Path | None
) -> dict[Method, Artifact]:
    if folder is None:
        return (
            dict(zip(methods, fit_all(model, methods, texts, tokenizer, batch=BATCH), strict=True)) if methods else {}
        )
    identity = model_key(model)
    where = {m: folder / f"{name_of(m)}-{_key(m, identity, texts)}" for m in methods}
    made = {m: artifact for m, place in where.items() if (artifact := _known(place)) is not None}
    todo = [m for m in methods if m not in made]
    if todo:
        checkpoint = folder / UNFINISHED
        artifacts = fit_all(model, todo, texts, tokenizer, batch=BATCH, checkpoint=checkpoint)
        for method, artifact in zip(todo, artifacts, strict=True):
            artifact.save_pretrained(where[method])
            made[method] = artifact
        clear(checkpoint)
    return made


def _known(place: Path) -> Artifact | None:
    """What was fitted before; one that cannot be read is fitted again."""
    try:
        return Artifact.from_pretrained(place) if (place / CONFIG).is_file() else None
    except ArtifactError:
        return None


def _key(method: Method, identity: str, texts: Sequence[str]) -> str:
    return key_of(name_of(method), method.settings(), identity, list(texts))

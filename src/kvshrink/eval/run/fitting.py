"""Fit whatever a comparison needs, in one pass over the text; with a folder, what was fitted before is read from it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvshrink.attach.factory import digest_of
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
    # by digest: settings that Python calls equal, a share of 1.0 and a count of 1, are two methods
    asked = {digest_of(e.method): e.method for e in entries if isinstance(e.method, Method) and e.method.needs_fit}
    made = _fit(asked, model, tokenizer, texts, folder)

    def ready(entry: Entry) -> Entry:
        key = digest_of(entry.method) if isinstance(entry.method, Method) else ""
        return replace(entry, method=made[key]) if key in made else entry

    return [ready(e) for e in entries]


def _fit(
    methods: dict[str, Method], model: Any, tokenizer, texts: Sequence[str], folder: Path | None
) -> dict[str, Artifact]:
    if folder is None:
        fits = fit_all(model, list(methods.values()), texts, tokenizer, batch=BATCH) if methods else []
        return dict(zip(methods, fits, strict=True))
    identity = model_key(model)
    where = {k: folder / f"{name_of(m)}-{_key(m, identity, texts)}" for k, m in methods.items()}
    made = {k: artifact for k, place in where.items() if (artifact := _known(place)) is not None}
    todo = [k for k in methods if k not in made]
    if todo:
        checkpoint = folder / UNFINISHED
        artifacts = fit_all(model, [methods[k] for k in todo], texts, tokenizer, batch=BATCH, checkpoint=checkpoint)
        for k, artifact in zip(todo, artifacts, strict=True):
            artifact.save_pretrained(where[k])
            made[k] = artifact
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

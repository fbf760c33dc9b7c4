"""A document that was read once and kept as a shrunken cache: a folder that answers any number of questions."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvshrink.attach import make_cache
from kvshrink.cache import KVCache
from kvshrink.errors import ArtifactError
from kvshrink.eval.run.entries import parse_all
from kvshrink.eval.run.prompt import encode
from kvshrink.eval.tasks import Sample
from kvshrink.methods._roles import Method
from kvshrink.methods.artifact import Artifact
from kvshrink.methods.text import text_of
from kvshrink.store import files
from kvshrink.store.atomic import write_all

CACHE, IDS, ABOUT, FITTED = "cache.safetensors", "ids.safetensors", "context.json", "artifact"
WRITES = (CACHE, IDS, ABOUT, FITTED)
FORMAT, VERSION = "kvshrink context", 1
BETWEEN = "\n\n"  # of a document and a question


@dataclass(frozen=True)
class Context:
    """A cache with a document's tokens, and which these are, int64 [1, t]."""

    cache: KVCache
    ids: Tensor

    def asked(self, question: str, tokenizer: Any) -> tuple[KVCache, Tensor]:
        """A cache of its own for one question, and all tokens up to its end."""
        rest = encode(Sample("", f"{BETWEEN}{question}", "", (), "", 0, {}), tokenizer)[1]
        more = torch.tensor([rest], device=self.ids.device)
        return copy.deepcopy(self.cache), torch.cat([self.ids, more], 1)


def document_ids(text: str, tokenizer: Any) -> list[int]:
    """Of a document as it stands before a question."""
    return encode(Sample(text, BETWEEN, "", (), "", 0, {}), tokenizer)[0]


def write(folder: Path, cache: KVCache, ids: Tensor, method: Method | Artifact) -> None:
    fitted = isinstance(method, Artifact)
    if isinstance(method, Artifact):
        method.save_pretrained(folder / FITTED)
    own = method.method if isinstance(method, Artifact) else method
    about = {"format": FORMAT, "version": VERSION, "method": text_of(own), "fitted": fitted}
    write_all(
        {
            folder / CACHE: files.tensors_of(cache.state_dict(), {"format": "kvshrink cache"}),
            folder / IDS: files.tensors_of({"ids": ids.int()}),
            folder / ABOUT: files.json_of(about),
        }
    )


def read(folder: Path, model: Any) -> Context:
    """Raises ArtifactError on a folder without a whole context, or one of another model."""
    about = files.read_json(folder / ABOUT)
    if (about.get("format"), about.get("version")) != (FORMAT, VERSION):
        raise ArtifactError(f"{folder / ABOUT} is no context of this version. Make it again by kvshrink compact.")
    ids = files.read_tensors(folder / IDS)[0].get("ids")
    cache = make_cache(model, _method(folder, about)).load(folder / CACHE)
    if ids is None or ids.dtype != torch.int32 or ids.shape != (1, cache.get_seq_length()):
        raise ArtifactError(f"{folder / IDS} is not of the cache beside it. Make it again by kvshrink compact.")
    assert isinstance(cache, KVCache)
    return Context(cache, ids.long().to(model.device))


def _method(folder: Path, about: dict[str, Any]) -> Method | Artifact:
    if about.get("fitted"):
        if not (folder / FITTED).is_dir():  # a name that is no folder would be looked for at the hub
            raise ArtifactError(f"{folder / FITTED} does not exist. Make it again by kvshrink compact.")
        return Artifact.from_pretrained(folder / FITTED)
    text = about.get("method")
    found = parse_all([text], {})[0].method if isinstance(text, str) else None
    if not isinstance(found, Method):
        raise ArtifactError(f"{folder / ABOUT} names no method. Make it again by kvshrink compact.")
    return found

"""Records of pages for a model in files, as an engine has it: what the method makes of the model, without its weights
in memory."""

from contextlib import ExitStack
from pathlib import Path

import torch

from kvshrink.attach.families import decoder_layers, text_tower
from kvshrink.attach.hook import detach
from kvshrink.fit.source import OnDisk
from kvshrink.methods._roles import Method
from kvshrink.methods.artifact import Artifact
from kvshrink.serve.records import PageRecords


def records_of(name: str | Path, method: Method | Artifact, dtype: torch.dtype | None = None) -> PageRecords:
    """name: a folder, or a hub id. dtype: the engine's, if it may be another than that of the files, whose layers are
    then held in it while this looks at them. Raises what `OnDisk` and `PageRecords.of` raise."""
    disk = OnDisk(name)
    with ExitStack() as stack:
        stack.enter_context(disk.embeddings())
        for i in range(len(decoder_layers(disk.model))):
            layer = stack.enter_context(disk.layer(i))  # views of mapped files
            if dtype is not None:
                layer.to(dtype)
        decoder = text_tower(disk.model)  # without its head, which may be tied and in no file
        try:
            return PageRecords.of(decoder, method)
        finally:
            detach(decoder)

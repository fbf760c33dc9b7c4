"""Where a layer's weights come from while it is fitted: a model in memory, or a folder read one layer at a time."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from kvshrink.attach.families import decoder_layers, text_tower
from kvshrink.attach.identity import decoder_of, identity_of
from kvshrink.errors import ArtifactError, KVShrinkError
from kvshrink.identity import Identity
from kvshrink.store import files
from kvshrink.store.reason import line

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class InMemory:
    """A loaded model."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.name = str(getattr(model, "name_or_path", "") or type(model).__name__)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def identity(self) -> Identity:
        return identity_of(self.model)

    @contextmanager
    def embeddings(self) -> Iterator[None]:
        yield

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        yield decoder_layers(self.model)[index]


class OnDisk:
    """A saved model of which only the shapes are in memory. Weights are read when a layer is used, and let go after."""

    def __init__(self, name: str | Path) -> None:
        from accelerate import init_empty_weights
        from transformers import AutoConfig, AutoModelForCausalLM

        self.folder, self.name = local_folder(name), str(name)
        try:
            with init_empty_weights(include_buffers=False):
                # else transformers asks on the terminal
                config = AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
                self.model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False).eval()
        except Exception as error:  # a config of any content comes in here, and transformers raises what it meets
            raise KVShrinkError(f"{self.folder} is no saved causal language model: {line(error)}.") from error
        if getattr(config, "quantization_config", None) is not None:
            raise KVShrinkError(
                f"the weights in {self.folder} are quantised, and cannot be read layer by layer. Load the model and "
                "pass it to kvshrink.fit."
            )
        self.files = _weight_files(self.folder)
        self.prefix = {id(m): f"{n}." for n, m in self.model.named_modules()}
        for layer in decoder_layers(self.model):
            self._names(layer)  # what is missing is refused before the first layer is fitted

    @property
    def device(self) -> torch.device:
        """Where the model would run: weights are read on the CPU, one layer at a time."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def identity(self) -> Identity:
        """From parts of the files: no tensor is read whole."""
        prefix = self.prefix[id(decoder_of(self.model))]

        def stored(name: str, tensor: Tensor) -> Tensor:
            file = self.files.get(prefix + name)
            if file is None:
                return tensor
            # a view of the mapped file, which is unmapped with it: else all that was looked at would stay in memory
            with safe_open(file, framework="pt") as f:
                found: Tensor = f.get_tensor(prefix + name)
            return found

        try:
            return identity_of(self.model, stored)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise ArtifactError(
                f"the weights in {self.folder} cannot be read: {line(error)}. Save the model again."
            ) from error

    @contextmanager
    def embeddings(self) -> Iterator[None]:
        """All that may run before the first layer: what the decoder holds beside its layers."""
        layers, tower = decoder_layers(self.model), text_tower(self.model)
        parts = {id(m): m for m in (self.model.get_input_embeddings(), *tower.children()) if m is not layers}
        with ExitStack() as stack:
            for part in parts.values():
                if part.state_dict() and not any(m is layers for m in part.modules()):
                    stack.enter_context(self._loaded(part))
            yield

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        layer = decoder_layers(self.model)[index]
        with self._loaded(layer):
            yield layer

    def _names(self, module: nn.Module) -> dict[str, str]:
        """{name in the files: name in the module}. Raises ArtifactError if one is in no file."""
        prefix = self.prefix[id(module)]
        names = {f"{prefix}{n}": n for n in module.state_dict()}
        missing = [n for n in names if n not in self.files]
        if missing:
            raise ArtifactError(
                f"{self.folder} lacks {len(missing)} tensors of {prefix[:-1]} ({missing[0]}). "
                "Load the model and pass it instead."
            )
        return names

    @contextmanager
    def _loaded(self, module: nn.Module) -> Iterator[None]:
        names = self._names(module)
        tensors: dict[str, Tensor] = {}
        try:
            for file in {self.files[n] for n in names}:
                # tensors are views of the mapped file: nothing is copied, and unmapping frees all
                with safe_open(file, framework="pt") as f:
                    tensors |= {short: f.get_tensor(n) for n, short in names.items() if self.files[n] == file}
            module.load_state_dict(tensors, assign=True)
        except (OSError, RuntimeError, SafetensorError) as error:
            what = f"the weights of {self.prefix[id(module)][:-1]} in {self.folder}"
            raise ArtifactError(f"{what} cannot be read: {line(error)}. Save the model again.") from error
        del tensors
        try:
            yield
        finally:
            empty = {n: torch.empty_like(t, device="meta") for n, t in module.state_dict().items()}
            module.load_state_dict(empty, assign=True)


def local_folder(name: str | Path, revision: str | None = None) -> Path:
    """A local folder, or the hub's copy, of this revision, in the local cache."""
    folder = Path(name)
    if folder.is_dir() and str(name):
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                str(name), revision=revision, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
            )
        )
    except Exception as error:
        raise KVShrinkError(
            f"no model {str(name)!r}: no such folder, and the hub did not give one ({line(error)}). Check the path."
        ) from error


def _weight_files(folder: Path) -> dict[str, Path]:
    """{tensor name: file}."""
    try:
        if (folder / INDEX).is_file():
            found = files.read_json(folder / INDEX).get("weight_map")
            if not isinstance(found, dict) or not all(isinstance(f, str) for f in found.values()):
                raise ValueError(f"{INDEX} has no map of weights")
            return {n: folder / f for n, f in found.items()}
        with safe_open(folder / SINGLE, framework="pt") as f:
            return dict.fromkeys(f.keys(), folder / SINGLE)
    except (OSError, ValueError, ArtifactError, SafetensorError) as error:
        raise ArtifactError(
            f"{folder} has no readable safetensors weights: {line(error)}. Save the model with save_pretrained."
        ) from error

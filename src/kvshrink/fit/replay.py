"""A forward pass that starts at a later layer: those before it give what they gave once, for the same tokens."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from kvshrink.attach.families import text_config

Outputs = list[Any]  # what each decoder layer gave


@contextmanager
def recorded(layers: list[nn.Module]) -> Iterator[Outputs]:
    """Forwards within leave the output of each layer here."""
    found: Outputs = [None] * len(layers)

    def keep(index: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found[index] = output

        return hook

    with ExitStack() as stack:
        for i, layer in enumerate(layers):
            stack.callback(layer.register_forward_hook(keep(i)).remove)
        yield found


@contextmanager
def replayed(layers: list[nn.Module], outputs: Outputs) -> Iterator[None]:
    """Forwards within take the outputs of these layers, the first ones of the model, from a record."""
    with ExitStack() as stack:
        for layer, output in zip(layers, outputs, strict=False):
            own = layer.__dict__.get("forward")  # accelerate's hooks replace a module's forward
            layer.__dict__["forward"] = _giving(output)
            stack.callback(_restore, layer, own)
        yield


def stands_alone(model: Any) -> bool:
    """Whether a layer needs nothing of those before it but their output."""
    return not getattr(text_config(model), "num_kv_shared_layers", 0)


def _giving(output: Any) -> Any:
    return lambda *args, **kwargs: output


def _restore(layer: nn.Module, own: Any) -> None:
    if own is None:
        del layer.__dict__["forward"]
    else:
        layer.__dict__["forward"] = own

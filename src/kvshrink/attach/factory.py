"""make_cache: one empty cache for a model, from a method or a fitted artifact."""

import warnings
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers.cache_utils import CacheLayerMixin, DynamicCache

from kvshrink.attach.families import first_weight, shape_of
from kvshrink.attach.fitted import check_queries, check_widths, fitting
from kvshrink.attach.hook import Attachment, attach
from kvshrink.attach.identity import decoder_of, identity_of
from kvshrink.attach.images import check_asks
from kvshrink.attach.offsets import with_constants_apart
from kvshrink.attach.owner import owner_of
from kvshrink.attach.target import transformers_model
from kvshrink.cache.cache import KVCache
from kvshrink.cache.drift import DriftWatch, Reference
from kvshrink.cache.layer import CompressedLayer
from kvshrink.cache.layout import before_rope
from kvshrink.cache.state_layer import StateAndCompressedLayer
from kvshrink.errors import ArtifactError, SettingError
from kvshrink.identity import Identity, difference
from kvshrink.methods import name_of
from kvshrink.methods._roles import Codec, Method
from kvshrink.methods._stats import LayerShape
from kvshrink.methods._tier import Tier
from kvshrink.methods._types import shown
from kvshrink.methods.artifact import Artifact
from kvshrink.store.digest import digest
from kvshrink.store.modes import own_modes
from kvshrink.store.tokens import TokenTable

DIGESTS: "WeakKeyDictionary[Artifact, str]" = WeakKeyDictionary()


@own_modes
def make_cache(model: Any, method: Any, watch: bool = False) -> KVCache:
    """An empty cache to pass as `past_key_values` to this model's `generate` or forward. Attaches the model.

    One text per cache: like DynamicCache, a used one takes what it is given next as the continuation of what it holds,
    also another prompt, and each prompt of a list given to a pipeline. Make a new one, or call its `reset()`.

    model: a transformers model, or a pipeline or wrapper of one (PEFT, torch.compile).
    method: a method, or a fitted artifact.
    watch: let `report()` say how far the sequence is from the calibration text; costs a projection of every token.
    Key biases so large that the method would lose by them (Qwen2) are kept apart from what is stored; where it cannot
    and loses most of what varies in the keys, it warns, once.
    Raises SettingError for a method that must be fitted first, ArtifactError for another model's artifact.
    """
    if not isinstance(method, Method | Artifact):
        raise SettingError(
            f"{shown(method)} is neither a method nor an artifact. Pass an object, such as kvshrink.RTN(bits=4)."
        )
    model = transformers_model(model)
    attachment = attach(model)
    artifact = method if isinstance(method, Artifact) else Artifact(method, {})
    identity = identity_of(model)
    _check(artifact, attachment, identity)
    check_asks(artifact.method, any(m is holder for m in model.modules() for holder in attachment.holders), model)
    table = TokenTable()
    layers: list[CacheLayerMixin] = []
    fitted_by = digest_of(artifact)
    ladders = fitting(artifact, {i: (s, _like(attachment, i)) for i, s in enumerate(shapes(attachment)) if s})
    _check_codecs(attachment, artifact, ladders)
    if apart := with_constants_apart(attachment, artifact, fitted_by, identity.digest, ladders):
        ladders = {**ladders, **apart}
        fitted_by = digest([fitted_by, list(apart)], {})[:16]  # a saved cache must be read as it was stored
    theirs: list[Any] = list(DynamicCache(config=model.config).layers)
    for i, shape in enumerate(shapes(attachment)):
        if shape is None:
            if attachment.layers[i].heads:
                theirs[i].shape = shape_of(attachment.layers[i])  # a saved one must fit
            layers.append(theirs[i])
        else:
            watched = _watch(artifact, i, ladders[i][0].codecs, _like(attachment, i)) if watch else None
            delta = artifact.method.stores_delta(artifact.layers.get(i, {}))
            base = [x for x in layers if isinstance(x, CompressedLayer)][-1] if delta else None
            place = (sum(isinstance(x, CompressedLayer) for x in layers), len(ladders))
            own = artifact.method.at_layer(*place)
            policy = own.policy(shape, _on(artifact.layers.get(i, {}), _like(attachment, i)))
            given = (own, shape, ladders[i], table, watched, base, policy)
            states = getattr(theirs[i], "number_of_states", None)
            layers.append(CompressedLayer(*given) if states is None else StateAndCompressedLayer(states, *given))
    device = next(model.parameters()).device
    owner = owner_of(decoder_of(model), identity)
    return KVCache(layers, artifact.method, table, attachment.name, fitted_by, device, owner)


def shapes(attachment: Attachment) -> list[LayerShape | None]:
    """Shape of each layer's cache; None for a layer that stays as it is."""
    return [shape_of(info) if info.compressed else None for info in attachment.layers]


def _check(artifact: Artifact, attachment: Attachment, identity: Identity) -> None:
    wanted = {i for i, info in enumerate(attachment.layers) if info.compressed}
    if not artifact.layers:
        if artifact.method.needs_fit and wanted:
            name = type(artifact.method).__name__
            raise SettingError(
                f"{name} must be fitted first: kvshrink.fit(model, {name}(...), texts), or `kvshrink fit`."
            )
        return
    name = artifact.model.get("name", "another model")
    different = difference(artifact.model.get("identity"), identity, "the artifact")
    if different is None and set(artifact.layers) != wanted:
        different = f"layers {sorted(wanted)} are compressed, not {sorted(artifact.layers)}"
    if different:
        raise ArtifactError(f"the artifact was fitted on {name}: of this model {different}. Fit one for this model.")


def _check_codecs(attachment: Attachment, artifact: Artifact, ladders: Mapping[int, tuple[Tier, ...]]) -> None:
    """Raise SettingError if a layer of two widths is stored as of one. Warn where keys cannot be turned back."""
    name = name_of(artifact.method)
    for i, tiers in ladders.items():
        info, pair = attachment.layers[i], tiers[0].codecs
        check_queries(info, artifact.method, i)
        if pair is None:
            continue
        check_widths(info, artifact.method, i, joint=pair[1].joint)
        if info.moves and before_rope(pair):
            warnings.warn(
                f"{name} stores keys before RoPE, but those of this model are turned in a way that cannot be undone: "
                "they are stored as attention uses them, and lose more. turboquant and kivi store them so by design.",
                stacklevel=4,
            )
            return


def _on(fitted: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    return {k: t.to(device) for k, t in fitted.items()}


def _like(attachment: Attachment, layer: int) -> torch.device:
    return first_weight(attachment.layers[layer].module).device


def _watch(artifact: Artifact, layer: int, codecs: tuple[Codec, Codec] | None, device: torch.device) -> DriftWatch:
    """What a layer's calibration rows were like, to compare with. Raises SettingError if it is not known."""
    references, fitted = [], artifact.layers.get(layer, {})
    for kv, codec in zip(("key", "value"), codecs or (), strict=False):
        errors, centre = fitted.get(f"{kv}_errors"), fitted.get(f"{kv}_centre")
        projection = codec.projection
        if projection is not None and errors is not None and centre is not None:
            error = float(errors[projection.rank - 1])
            references.append(Reference(projection.apply, centre.to(device), error))
    if len(references) != 2:
        name = name_of(artifact.method)
        raise SettingError(f"this {name} has no error on a calibration text to watch. Fit cskv, or use watch=False.")
    return DriftWatch((references[0], references[1]))


def digest_of(method: Method | Artifact) -> str:
    """Hash of a method's settings and fitted tensors; an artifact's is computed once."""
    artifact = method if isinstance(method, Artifact) else Artifact(method, {})
    known = DIGESTS.get(artifact)
    if known is None:
        tensors = {f"{i}.{k}": t for i, layer in artifact.layers.items() for k, t in layer.items()}
        settings = [name_of(artifact.method), artifact.method.settings()]
        known = DIGESTS[artifact] = digest(settings, tensors)[:16]
    return known

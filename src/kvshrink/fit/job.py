"""fit: a method's tensors for every layer of a model, from calibration text."""

import importlib.util
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from tqdm import tqdm

from kvshrink.attach.families import LayerInfo, layers_of, shape_of, text_config
from kvshrink.attach.target import check_loaded, transformers_model
from kvshrink.errors import DataError, SettingError
from kvshrink.fit.allocate import choose_share
from kvshrink.fit.collector import StatsCollector
from kvshrink.fit.data import rows_hash, rows_of
from kvshrink.fit.distil import PredictionLoss
from kvshrink.fit.layerwise import LayerRunner
from kvshrink.fit.outputs import OutputLoss
from kvshrink.fit.probe import Recall
from kvshrink.fit.reconstruct import RowLoss
from kvshrink.fit.resume import Checkpoint
from kvshrink.fit.source import InMemory, OnDisk
from kvshrink.fit.statistics import describe
from kvshrink.fit.train import Loss, train
from kvshrink.methods import name_of
from kvshrink.methods._roles import Method
from kvshrink.methods._stats import KVS, CalibrationStats, LayerShape, Moments
from kvshrink.methods._types import shown
from kvshrink.methods.artifact import Artifact
from kvshrink.methods.lowrank.cskv import CSKV
from kvshrink.store.modes import evaluating, outside_modes
from kvshrink.store.reason import line

TRACKERS = ("tensorboard", "trackio")
ROW = 1024  # tokens of a calibration row
PROBES = 4  # batches on which key_share="auto" compares attention outputs


def fit(
    model: Any,
    method: Any,
    data: str | Tensor | Iterable[str] | Iterable[Tensor],
    tokenizer=None,
    length: int | None = None,
    batch: int = 1,
    progress: bool = True,
    checkpoint: str | Path | None = None,
    log_with: str | None = None,
) -> Artifact:
    """Fit a method to a model. Only one layer's activations are held at a time.

    model: a loaded model (or a pipeline or wrapper of one), or a folder or hub id whose weights are then read one layer
    at a time. method: one that has something to fit, such as CSKV(keep=0.2).
    data: calibration text(s), cut into rows of `length` tokens (None: 1024, or the model's context if that is less), or
    token rows [rows, length].
    batch: rows per forward pass. checkpoint: folder for finished layers; call again with it to resume.
    log_with: tracker of accelerate for training losses, "tensorboard" or "trackio".
    Raises DataError on too little text, UnsupportedModelError, SettingError.
    """
    return fit_all(model, [method], data, tokenizer, length, batch, progress, checkpoint, log_with)[0]


def fit_all(
    model: Any,
    methods: Sequence,
    data: str | Tensor | Iterable[str] | Iterable[Tensor],
    tokenizer=None,
    length: int | None = None,
    batch: int = 1,
    progress: bool = True,
    checkpoint: str | Path | None = None,
    log_with: str | None = None,
) -> list[Artifact]:
    """As `fit`, for several methods in one pass over the text."""
    methods = list(methods)
    _check_given(methods, tokenizer, length, batch, checkpoint, log_with)
    if isinstance(model, str | Path):
        source: InMemory | OnDisk = OnDisk(model)
    else:
        tokenizer = tokenizer or getattr(model, "tokenizer", None)  # a pipeline has one
        inner = transformers_model(model)
        check_loaded(inner)
        source = InMemory(inner)
    infos = layers_of(source.model)
    shapes = [shape_of(info.module) for info in infos if info.compressed]
    methods = [method.resolve_auto(shapes, source.device) for method in methods]
    for method in methods:
        for shape in dict.fromkeys(shapes):
            method.bits_per_token(shape, {})  # what these shapes make impossible is refused now, not after the pass
    page = max(method.page for method in methods)
    length = default_length(source.model) if length is None else length
    rows = _enough(rows_of(data, lambda: tokenizer or _tokenizer(source.name), length, page), methods)
    _check_ids(rows, text_config(source.model).vocab_size)
    if isinstance(source, OnDisk) and any(in_memory(m) for m in methods):
        names = ", ".join(name_of(m) for m in methods if in_memory(m))
        raise SettingError(f"{names} asks the whole model what a loss costs. Load the model and pass it to fit.")
    job = _Job(source, infos, list(methods), rows, batch, progress, log_with, checkpoint)
    # Fisher and training switch gradients on themselves
    with torch.inference_mode(False), torch.no_grad(), outside_modes(), evaluating(source.model):
        return job.run()


def default_length(model: Any) -> int:
    """Tokens of a calibration row, where nobody says: no more than the model's context."""
    return min(ROW, getattr(text_config(model), "max_position_embeddings", None) or ROW)


def _check_given(
    methods: Sequence, tokenizer: Any, length: object, batch: object, checkpoint: object, log_with: object
) -> None:
    """Raise SettingError on what no fit could use."""
    if not methods:
        raise SettingError("no method is given. Pass one or more, such as kvshrink.CSKV(keep=0.2).")
    for method in methods:
        if not isinstance(method, Method):
            raise SettingError(f"{shown(method)} is not a method. Pass an object, such as kvshrink.CSKV(keep=0.2).")
        if not method.needs_fit:
            raise SettingError(f"{name_of(method)} needs no fit. Pass it to make_cache(model, method) as it is.")
    for name, value in (("length", ROW if length is None else length), ("batch", batch)):
        if type(value) is not int or value < 1:
            raise SettingError(f"{name}={shown(value)} is not possible. Use a whole number, 1 or more.")
    if tokenizer is not None and not callable(tokenizer):
        raise SettingError(f"tokenizer={shown(tokenizer)} is not possible. Pass the model's tokenizer.")
    if not isinstance(checkpoint, str | Path | None):
        raise SettingError(f"checkpoint={shown(checkpoint)} is not possible. Give the path of a folder.")
    if log_with not in (None, *TRACKERS):
        raise SettingError(f"log_with={shown(log_with)} is not possible. Use one of {TRACKERS}.")
    if log_with is not None and importlib.util.find_spec(log_with) is None:  # accelerate would log nothing
        raise SettingError(f"log_with={log_with} needs {log_with}: pip install {log_with}.")


def _enough(rows: Tensor, methods: Sequence[Method]) -> Tensor:
    """The rows, a single one cut in two where something is trained, since some must be held out."""
    page = max(method.page for method in methods)
    given = tuple(rows.shape)
    if len(rows) == 1 and any(_trains(m) for m in methods):
        rows = rows[:, : rows.shape[1] // 2 * 2].view(2, -1)
    halves = any(getattr(m, "key_share", None) == "auto" or _trains(m, "output") for m in methods)
    least = 2 * page if halves else page + 1
    if rows.shape[1] < least:
        what = "comparing halves of rows" if halves else "holding out half of a row"
        raise DataError(f"rows of shape {given} are too short for {what}: {rows.shape[1]} tokens a row, not {least}.")
    return rows


def _check_ids(rows: Tensor, vocabulary: int) -> None:
    low, high = int(rows.min()), int(rows.max())
    if low < 0 or high >= vocabulary:
        raise DataError(f"token ids run from {low} to {high}, the model has 0 to {vocabulary - 1}. Use its tokenizer.")


def in_memory(method: Method) -> bool:
    """Whether a fit needs the whole model in memory."""
    return method.probes or _trains(method, "kl")


def _trains(method: Method, loss: str | None = None) -> bool:
    return isinstance(method, CSKV) and method.steps > 0 and loss in (None, method.loss)


def _tokenizer(name: str):
    try:
        return transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # files of any content come in here, and transformers raises what it meets
        raise DataError(
            f"{name} has no tokenizer ({line(error)}). Pass tokenizer=, or token rows instead of text."
        ) from error


@dataclass
class _Job:
    """One run of `fit_all`."""

    source: InMemory | OnDisk
    infos: list[LayerInfo]
    methods: list[Method]
    rows: Tensor
    batch: int
    progress: bool
    log_with: str | None
    folder: str | Path | None
    recalls: dict[tuple, Recall] = field(default_factory=dict)

    def run(self) -> list[Artifact]:
        started = time.perf_counter()
        settings = [(name_of(m), m.settings()) for m in self.methods]
        job = {"methods": settings, "rows": rows_hash(self.rows), "model": self.source.name}
        identity = self.source.identity()
        checkpoint = Checkpoint(self.folder, job | {"identity": identity.digest})
        runner = LayerRunner(self.source, self.rows, self.batch)
        done: dict[int, list[tuple[dict[str, Tensor], dict]]] = {}
        for i in tqdm(range(runner.layers), desc="fit", unit="layer", disable=not self.progress):
            with self.source.layer(i) as layer:
                known = checkpoint.load(i, len(self.methods)) if self.infos[i].compressed else None
                if known is None and self.infos[i].compressed:
                    done[i] = self._layer(i, layer, runner)
                    checkpoint.save(i, done[i])
                    continue
                if known is not None:
                    done[i] = known
                runner.run(i, layer)
        del runner  # all hidden states
        model = {"name": self.source.name, "identity": identity.to_dict()}
        return [self._artifact(n, method, done, model, started) for n, method in enumerate(self.methods)]

    def _artifact(self, n: int, method: Method, done: dict, model: dict, started: float) -> Artifact:
        shapes = {i: shape_of(self.infos[i].module) for i in done}
        records = {i: dict(results[n][1]) for i, results in done.items()}
        # a probe reads the model's own keys through codecs made of these
        device = next(self.source.model.parameters()).device if method.probes else torch.device("cpu")
        layers = {i: {k: t.to(device) for k, t in results[n][0].items()} for i, results in done.items()}
        tensors, record = method.finish(layers, shapes, self._probe(method))
        tensors = {i: {k: t.cpu() for k, t in fitted.items()} for i, fitted in tensors.items()}
        for i, known in record.pop("layers", {}).items():  # what a layer's own fit could not know, such as its rank
            records[i] |= known
        if isinstance(method, CSKV) and _trains(method, "kl"):
            tensors, record["training"] = self._distil(method, tensors, shapes, records)
        seconds = time.perf_counter() - started
        provenance = record | {
            "calibration": rows_hash(self.rows),
            "rows": list(self.rows.shape),
            "seconds": round(seconds, 2),
            "made": datetime.now(UTC).isoformat(timespec="seconds"),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "layers": {str(i): record for i, record in records.items()},
        }
        return Artifact(method, tensors, dict(model), provenance)

    def _distil(
        self, method: CSKV, layers: dict, shapes: dict[int, LayerShape], records: dict[int, dict]
    ) -> tuple[dict[int, dict[str, Tensor]], dict]:
        """All layers trained jointly; their errors on the calibration text are entered anew."""
        device = next(self.source.model.parameters()).device
        layers = {i: {k: t.to(device) for k, t in fitted.items()} for i, fitted in layers.items()}
        moments = {(i, s): fitted.pop(f"{s}_covariance") for i, fitted in layers.items() for s in KVS}
        loss = PredictionLoss(self.source.model, self.infos, self.rows, method)
        trained, record = train(method, layers, shapes, loss, "predictions", self.progress, self.log_with)
        for (i, kv), covariance in moments.items():
            centre = trained[i][f"{kv}_centre"].double()
            records[i] |= describe(trained[i], kv, Moments(self.rows.numel(), centre, covariance))
        return {i: {k: t.cpu() for k, t in fitted.items()} for i, fitted in trained.items()}, record

    def _probe(self, method: Method) -> Recall | None:
        if not method.probes:
            return None
        key = (method.window, method.sinks, method.page)
        if key not in self.recalls:
            self.recalls[key] = Recall(self.source.model, self.infos, self.rows, method, self.progress)
        return self.recalls[key]

    def _layer(self, index: int, layer: nn.Module, runner: LayerRunner) -> list[tuple[dict[str, Tensor], dict]]:
        """(tensors, record of errors and seconds) per method of one loaded layer; moves the hidden states on."""
        cskvs = [m for m in self.methods if isinstance(m, CSKV)]
        whole = any(_trains(m, "output") for m in cskvs)
        probes = len(self.rows) if whole else PROBES if any(m.key_share == "auto" for m in cskvs) else 0
        seen = StatsCollector(probes, any(_trains(m, "rows") for m in cskvs), any(m.samples for m in self.methods))
        runner.run(index, layer, seen)
        stats = seen.stats(self.infos[index])
        return [self._fit_one(method, index, stats, seen) for method in self.methods]

    def _fit_one(
        self, method: Method, index: int, stats: CalibrationStats, seen: StatsCollector
    ) -> tuple[dict[str, Tensor], dict]:
        started = time.perf_counter()
        record: dict = {}
        info = self.infos[index]
        if isinstance(method, CSKV) and method.key_share == "auto":
            share, errors = choose_share(method, stats, info.module, info.rope, seen.inputs[:PROBES])
            fitted = method.fit_layer(stats, share)
            record |= {"key_share": share, "share_errors": {str(k): v for k, v in errors.items()}}
        else:
            fitted = method.fit_layer(stats)
        if isinstance(method, CSKV) and method.steps and method.loss != "kl":
            shapes, label = {index: stats.shape}, f"layer {index}"
            loss = self._loss(method, info, seen)
            trained, training = train(method, {index: fitted}, shapes, loss, label, self.progress, self.log_with)
            fitted, record["training"] = trained[index], training
        for kv, moments in zip(KVS, (stats.key, stats.value), strict=True):
            record |= describe(fitted, kv, moments)
            if _trains(method, "kl"):
                fitted[f"{kv}_covariance"] = moments.covariance  # until all layers are trained
            fitted[f"{kv}_spectrum"] = torch.linalg.eigvalsh(moments.covariance).flip(0).clamp_min(0).sqrt().float()
        record["seconds"] = round(time.perf_counter() - started, 3)
        return {k: t.cpu() for k, t in fitted.items()}, record

    def _loss(self, method: CSKV, info: LayerInfo, seen: StatsCollector) -> Loss:
        if method.loss == "output":
            return OutputLoss(info, seen.inputs, method.page)
        return RowLoss(torch.cat(seen.keys), torch.cat(seen.values), method.page)

"""fit: a method's tensors for every layer of a model, from calibration text."""

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

from kvshrink.attach.families import LayerInfo, shape_of, text_config
from kvshrink.attach.fitted import check_queries, check_widths
from kvshrink.attach.look import layers_of
from kvshrink.attach.target import check_loaded, transformers_model
from kvshrink.errors import DataError, SettingError
from kvshrink.fit.allocate import choose_split
from kvshrink.fit.collector import StatsCollector
from kvshrink.fit.data import rows_hash, rows_of
from kvshrink.fit.distil import PredictionLoss
from kvshrink.fit.given import ROW, check_given, check_ids, enough, in_memory, sharded, trains
from kvshrink.fit.layerwise import LayerRunner
from kvshrink.fit.outputs import OutputLoss, float32
from kvshrink.fit.probe import Recall
from kvshrink.fit.reconstruct import RowLoss
from kvshrink.fit.resume import Checkpoint
from kvshrink.fit.source import InMemory, OnDisk
from kvshrink.fit.statistics import describe
from kvshrink.fit.train import Loss, train
from kvshrink.methods import name_of
from kvshrink.methods._roles import Method
from kvshrink.methods._stats import KVS, CalibrationStats, LayerShape, Moments
from kvshrink.methods._training import Training
from kvshrink.methods.artifact import Artifact
from kvshrink.methods.visual import visual_method
from kvshrink.store.modes import evaluating, outside_modes
from kvshrink.store.reason import line

PROBES = 4  # batches on which splits between keys and values are compared


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
    shards: int | None = None,
) -> Artifact:
    """Fit a method to a model. Only one layer's activations are held at a time.

    model: a loaded model (or a pipeline or wrapper of one), or a folder or hub id whose weights are then read one layer
    at a time. method: one that has something to fit, such as CSKV(keep=0.2).
    data: calibration text(s), cut into rows of `length` tokens (None: 1024, or the model's context if that is less), or
    token rows [rows, length].
    batch: rows per forward pass. checkpoint: folder for finished layers; call again with it to resume.
    log_with: tracker of accelerate for training losses, "tensorboard" or "trackio".
    shards: ranks of a tensor-parallel server, each of which has bases of its own KV heads; None: as the method says.
    Raises DataError on too little text, UnsupportedModelError, SettingError.
    """
    if shards is not None:
        method = sharded(method, shards)
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
    check_given(methods, tokenizer, length, batch, checkpoint, log_with)
    if isinstance(model, str | Path):
        source: InMemory | OnDisk = OnDisk(model)
    else:
        tokenizer = tokenizer or getattr(model, "tokenizer", None)  # a pipeline has one
        inner = transformers_model(model)
        check_loaded(inner)
        source = InMemory(inner)
    infos = layers_of(source.model)
    shapes = [shape_of(info) for info in infos if info.compressed]
    methods = [method.resolve_auto(shapes, source.device) for method in methods]
    for method in methods:
        visual_method(method)
        for i, info in enumerate(infos):
            if info.compressed:
                check_widths(info, method, i)
                check_queries(info, method, i)
        for shape in dict.fromkeys(shapes):
            method.bits_per_token(shape, {})  # what these shapes make impossible is refused now, not after the pass
    page = max(method.page for method in methods)
    length = default_length(source.model) if length is None else length
    rows = enough(rows_of(data, lambda: tokenizer or _tokenizer(source.name), length, page), methods)
    check_ids(rows, text_config(source.model).vocab_size)
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
        shapes = {i: shape_of(self.infos[i]) for i in done}
        records = {i: dict(results[n][1]) for i, results in done.items()}
        # a probe reads the model's own keys through codecs made of these
        device = next(self.source.model.parameters()).device if method.probes else torch.device("cpu")
        layers = {i: {k: t.to(device) for k, t in results[n][0].items()} for i, results in done.items()}
        tensors, record = method.finish(layers, shapes, self._probe(method))
        tensors = {i: {k: t.cpu() for k, t in fitted.items()} for i, fitted in tensors.items()}
        for i, known in record.pop("layers", {}).items():  # what a layer's own fit could not know, such as its rank
            records[i] |= known
        training = method.training()
        if training is not None and training.loss == "kl":
            tensors, record["training"] = self._distil(method, training, tensors, shapes, records)
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
        self,
        method: Method,
        training: Training,
        layers: dict,
        shapes: dict[int, LayerShape],
        records: dict[int, dict],
    ) -> tuple[dict[int, dict[str, Tensor]], dict]:
        """All layers trained jointly; their errors on the calibration text are entered anew."""
        device = next(self.source.model.parameters()).device
        layers = {i: {k: t.to(device) for k, t in fitted.items()} for i, fitted in layers.items()}
        moments = {(i, s): fitted.pop(f"{s}_covariance") for i, fitted in layers.items() for s in KVS}
        loss = PredictionLoss(self.source.model, self.infos, self.rows, method)
        trained, record = train(method, training, layers, shapes, loss, "predictions", self.progress, self.log_with)
        for (i, kv), covariance in moments.items():
            centre = trained[i][f"{kv}_centre"].double()
            records[i] |= describe(trained[i], kv, Moments(self.rows.numel(), centre, covariance))
        return {i: {k: t.cpu() for k, t in fitted.items()} for i, fitted in trained.items()}, record

    def _probe(self, method: Method) -> Recall | None:
        if not method.probes:
            return None
        key = (method.window, method.sinks, method.page, method.window_bits, method.rounds_window)
        if key not in self.recalls:
            # in bfloat16 the noise of predictions is as large as what one layer's codes cost
            model = float32(self.source.model)
            self.recalls[key] = Recall(model, layers_of(model), self.rows, method, self.progress)
        return self.recalls[key]

    def _layer(self, index: int, layer: nn.Module, runner: LayerRunner) -> list[tuple[dict[str, Tensor], dict]]:
        """(tensors, record of errors and seconds) per method of one loaded layer; moves the hidden states on."""
        whole = any(trains(m, "output") for m in self.methods)
        probes = len(self.rows) if whole else PROBES if any(m.splits() for m in self.methods) else 0
        rows = any(trains(m, "rows") for m in self.methods)
        seen = StatsCollector(probes, rows, any(m.samples for m in self.methods), self.infos[index].moves)
        runner.run(index, layer, seen, self.infos[index].module)
        stats = seen.stats(self.infos[index])
        return [self._fit_one(method, index, stats, seen) for method in self.methods]

    def _fit_one(
        self, method: Method, index: int, stats: CalibrationStats, seen: StatsCollector
    ) -> tuple[dict[str, Tensor], dict]:
        started = time.perf_counter()
        record: dict = {}
        info = self.infos[index]
        if splits := method.splits():
            share, errors = choose_split(method, stats, info.module, info.rope, seen.inputs[:PROBES])
            fitted = splits[share].fit_layer(stats)
            record |= {"key_share": share, "share_errors": {str(k): v for k, v in errors.items()}}
        else:
            fitted = method.fit_layer(stats)
        training = method.training()
        if training is not None and training.loss != "kl":
            shapes, label = {index: stats.shape}, f"layer {index}"
            loss = _loss(training, method.page, info, seen)
            trained, record["training"] = train(
                method, training, {index: fitted}, shapes, loss, label, self.progress, self.log_with
            )
            fitted = trained[index]
        for kv, moments in zip(KVS, (stats.key, stats.value), strict=True):
            record |= describe(fitted, kv, moments)
            if trains(method, "kl"):
                fitted[f"{kv}_covariance"] = moments.covariance  # until all layers are trained
            fitted[f"{kv}_spectrum"] = torch.linalg.eigvalsh(moments.covariance).flip(0).clamp_min(0).sqrt().float()
        record["seconds"] = round(time.perf_counter() - started, 3)
        return {k: t.cpu() for k, t in fitted.items()}, record


def _loss(training: Training, page: int, info: LayerInfo, seen: StatsCollector) -> Loss:
    if training.loss == "output":
        return OutputLoss(info, seen.inputs, page)
    return RowLoss(torch.cat(seen.keys), torch.cat(seen.values), page)

"""Honest files of every kind, and how each is read and used: what a mutated one is compared with."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import kvshrink
from kvshrink import Artifact
from kvshrink.attach.identity import identity_of
from kvshrink.eval.run.outcomes import Outcome
from kvshrink.fit.resume import Checkpoint
from kvshrink.methods import build
from kvshrink.plan import file as plans
from kvshrink.plan.bench import is_point
from kvshrink.store.digest import sealed
from kvshrink.store.log import Log, key_of
from tests.scenarios.families import VOCAB, Family

METHODS = {
    "cskv": ("cskv", {"keep": 0.5}),
    "cskv4": ("cskv", {"keep": 0.5, "bits": 4}),
    "spectral": ("spectral", {"budget": 0.2}),
    "rtn": ("rtn", {"bits": 4}),
    "kivi": ("kivi", {"bits": 2}),
    "turboquant": ("turboquant", {}),
    "tcq": ("tcq", {}),
    "xquant": ("xquant", {}),
    "xquant_cl": ("xquant_cl", {}),
    "kvquant": ("kvquant", {}),
    "think": ("think", {}),
    "a2ats": ("a2ats", {}),
    "saq": ("saq", {"ages": [32, 32]}),
    "zipcache": ("zipcache", {}),
    "streaming": ("streaming_llm", {}),
}
PROMPT, STEPS = 150, 3


@dataclass(frozen=True)
class Subject:
    """Files of one kind. read: what they say, used; files: their names, of which one is mutated."""

    name: str
    kind: str
    files: tuple[str, ...]
    read: Callable[[Path], Any]


class Subjects:
    """A tiny model and honest files in a folder, made from a seed."""

    def __init__(self, folder: Path, names: tuple[str, ...] = tuple(METHODS)) -> None:
        self.folder = folder
        self.model = Family("Llama").build()
        tokens = torch.Generator().manual_seed(5)
        self.rows = torch.randint(2, VOCAB, (6, 128), generator=tokens)
        self.prompt = torch.randint(2, VOCAB, (2, PROMPT), generator=tokens)
        self.methods = {name: build(*METHODS[name]) for name in names}
        self.made = {name: self._fitted(method) for name, method in self.methods.items()}
        self.all = [s for name in names for s in self._of_method(name)] + [self._checkpoint(), self._plan()]
        self.all += [self._log("outcomes"), self._log("points")]

    def _fitted(self, method: Any) -> Artifact:
        if not method.needs_fit:
            return Artifact(method, {})
        return kvshrink.fit(self.model, method, self.rows, progress=False)

    def _of_method(self, name: str) -> list[Subject]:
        artifact, folder = self.made[name], self.folder / name
        artifact.save_pretrained(folder)
        cache, mask = kvshrink.make_cache(self.model, artifact), torch.ones_like(self.prompt)
        mask[1, : 20 if name in ("cskv4", "kivi", "zipcache") else 0] = 0
        with torch.inference_mode():
            self.model(input_ids=self.prompt, attention_mask=mask, past_key_values=cache)
        for ending, deflate in (("plain", False), ("small", True)):
            cache.save(folder / f"{ending}.safetensors", deflate)
        found = [Subject(f"{name} artifact", "artifact", ("kvshrink.json", "kvshrink.safetensors"), self._artifact)]
        for ending in ("plain", "small"):
            file = f"{ending}.safetensors"
            found.append(Subject(f"{name} {ending} cache", ending, (file,), self._cache(artifact, file, mask)))
        return [Subject(s.name, s.kind, tuple(f"{name}/{f}" for f in s.files), s.read) for s in found]

    def _artifact(self, folder: Path) -> Any:
        artifact = Artifact.from_pretrained(folder)
        cache = kvshrink.make_cache(self.model, artifact)
        with torch.inference_mode():
            logits = self.model(input_ids=self.prompt, past_key_values=cache).logits
        return [artifact.layers, artifact.provenance, artifact.nbytes, self._steps(cache, None), logits[:, -1]]

    def _cache(self, artifact: Artifact, file: str, mask: torch.Tensor) -> Callable[[Path], Any]:
        def read(folder: Path) -> Any:
            cache = kvshrink.make_cache(self.model, artifact).load(folder / file)
            held = cache.nbytes
            return [held, self._steps(cache, mask), cache.state_dict()]

        return read

    def _steps(self, cache: Any, mask: torch.Tensor | None) -> torch.Tensor:
        found = []
        with torch.inference_mode():
            for n in range(STEPS):
                if mask is not None:
                    mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
                step = torch.full((2, 1), 7 + n)
                found.append(self.model(input_ids=step, attention_mask=mask, past_key_values=cache).logits)
        return torch.cat(found, 1)

    def _checkpoint(self) -> Subject:
        results = [({"key_up": torch.randn(2, 4, 16), "key_kept": torch.arange(8)}, {"key_error": 0.5, "seconds": 1.0})]
        Checkpoint(self.folder / "fit", {"a": 1}).save(0, results)

        def read(folder: Path) -> Any:
            found = Checkpoint(folder, {"a": 1}).load(0, 1)
            return None if found is None else [(t, {**r}) for t, r in found]

        return Subject("checkpoint", "checkpoint", ("fit/layer_000_0.safetensors",), read)

    def _plan(self) -> Subject:
        values: dict = dict.fromkeys(plans.KEYS - {"sha256"}, 0) | {"version": plans.VERSION, "method": "cskv"}
        values |= {
            "settings": {"keep": 0.2, "bits": 4},
            "model": {"name": "a", "identity": identity_of(self.model).to_dict()},
        }
        values |= {
            "budget": {"byte_ratio": 0.25},
            "front": [{"name": "rtn", "settings": {}, "kl": 0.5}] * 3,
            "kl": 0.25,
        }
        (self.folder / "plan").mkdir()
        (self.folder / "plan" / "plan.json").write_text(json.dumps(sealed(values), indent=1))

        def read(folder: Path) -> Any:
            method, model = plans.read(folder / "plan.json")
            return [method.settings(), model["name"], model["identity"]]

        return Subject("plan", "plan", ("plan/plan.json",), read)

    def _log(self, name: str) -> Subject:
        path, valid = self.folder / name / "log.jsonl", {"outcomes": Outcome.of, "points": is_point}[name]
        keys = [key_of(name, i) for i in range(6)]
        log = Log(path)
        for i, key in enumerate(keys):
            texts = {"task": "t", "mode": "agnostic", "method": "cskv", "output": "x\u00e9\n", "expected": ["a"]}
            counts = {"length": 9, "index": i, "context": i, "tokens": 50, "nbytes": 100, "full": 400}
            numbers = {"depth": None, "score": 0.5, "seconds": 0.1, "encode": 0.2}
            point = {"method": "rtn", "settings": {"bits": 4}, "kl": i / 7}
            log.add({"key": key} | (texts | counts | numbers if name == "outcomes" else point))

        def read(folder: Path) -> Any:
            again = Log(folder / "log.jsonl")
            found = {key: again.rows[key] for key in keys if again.has(key, valid)}
            for row in found.values():  # used
                _ = Outcome(**row).byte_ratio if name == "outcomes" else row["kl"] < 1
            return found

        return Subject(f"{name} log", "log", (f"{name}/log.jsonl",), read)

"""Run ablations and write them down: a JSON and a picture each, and one page of all that the folder holds."""

import platform
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from tqdm import tqdm

from kvshrink.errors import EvalError
from kvshrink.eval.report import plots
from kvshrink.eval.report.old_keys import renamed
from kvshrink.eval.report.style import RC
from kvshrink.eval.run.outcomes import Failure
from kvshrink.store import files
from recipes.cskv_paper import EXPERIMENTS, chosen
from recipes.cskv_paper.lab import Lab, Settings
from recipes.cskv_paper.page import page

FORMAT = 1
PAGE = "ablations.md"


def run(
    settings: Settings, model: Any, tokenizer: Any, texts: Sequence[str], out: Path, command: str
) -> dict[str, Any]:
    """{"seconds": {name: ...}, "failures": [...]} of the experiments asked for; what is known is not made again."""
    modules, out = chosen(settings.only), Path(out)
    plots.pyplot()  # without it hours would end in nothing
    lab = Lab(settings, model, tokenizer, texts, out)
    described = describe(lab, command)
    seconds, failures = {}, []
    for name, module in tqdm(modules.items(), desc="ablations", unit="experiment"):
        started = time.perf_counter()
        lab.failures, lab.left_out = [], []
        try:
            data = module.run(lab)
        except Exception as error:  # the others go on
            line = (str(error).splitlines() or [""])[0]
            data = {"rows": []}
            lab.failures.append(Failure(name, "all", lab.length, f"{type(error).__name__}: {line}"))
        data |= {
            "format": FORMAT,
            "experiment": name,
            "settings": described,
            "failures": [asdict(x) for x in lab.failures],
            "left_out": [asdict(x) for x in lab.left_out],
        }
        failures += [{"experiment": name, **x} for x in data["failures"]]
        files.write_json(out / f"{name}.json", data)
        if data["rows"]:
            picture(module, data, out / f"{name}.png")
        seconds[name] = round(time.perf_counter() - started, 1)
    write_page(out)
    return {"seconds": seconds, "failures": failures}


def picture(module: ModuleType, data: dict, path: Path) -> None:
    with plots.pyplot().rc_context(RC):
        plots.save(module.draw(data), path)


def redraw(folder: Path) -> Path:
    """Page and pictures of the numbers in a folder; nothing is measured. Raises EvalError if there are none."""
    known = {name: m for name, m in EXPERIMENTS.items() if (folder / f"{name}.json").is_file()}
    if not known:
        raise EvalError(f"{folder} has no numbers of an ablation. Measure them: leave --redraw out.")
    for name, module in known.items():
        data = renamed(files.read_json(folder / f"{name}.json"))
        if data["rows"]:
            picture(module, data, folder / f"{name}.png")
    return write_page(folder)


def write_page(out: Path) -> Path:
    """The page of every experiment whose JSON is in the folder, also those of earlier runs."""
    found = {
        name: renamed(files.read_json(out / f"{name}.json")) for name in EXPERIMENTS if (out / f"{name}.json").is_file()
    }
    text = page(found, EXPERIMENTS)
    files.write_all({out / PAGE: lambda part: part.write_text(text, encoding="utf-8")})
    return out / PAGE


def describe(lab: Lab, command: str) -> dict:
    """What these numbers were made with."""
    versions = {name: version(name) for name in ("kvshrink", "torch", "transformers")}
    device = next(lab.model.parameters()).device
    return {k: v for k, v in asdict(lab.settings).items() if k != "only"} | {
        "lr": lab.settings.lr,
        "command": command,
        "dtype": str(lab.model.dtype).removeprefix("torch."),
        "versions": versions | {"python": platform.python_version()},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "calibration": {"texts": len(lab.texts), "characters": sum(map(len, lab.texts))},
    }

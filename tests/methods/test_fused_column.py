"""docs/methods.md says which methods a fused kernel reads: asked of the methods themselves."""

import re
from pathlib import Path

import pytest
import torch

from kvshrink import methods
from kvshrink.cache.layout import kernel_for
from kvshrink.kernels import native
from kvshrink.methods._stats import LayerShape

SHAPE = LayerShape(4, 16, torch.float32)
PAGE = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()


def fused(name: str, stats_of) -> str:
    method = methods.get(name)()
    pair = method.codecs(SHAPE, method.fit_layer(stats_of(SHAPE)) if method.needs_fit else {})
    return "-" if pair is None else str(kernel_for(pair, SHAPE, method.page, torch.device("cpu")))


@pytest.mark.skipif(native.library() is None, reason="no C++ kernels")
@pytest.mark.parametrize("name", methods.names())
def test_the_column_is_true(name, stats_of):
    (row,) = re.findall(rf"^\| `{name}` \|.*$", PAGE, flags=re.M)
    said = [cell.strip() for cell in row.split("|")[8:9]]
    assert said == [fused(name, stats_of).partition(":")[0]]

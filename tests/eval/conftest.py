"""The bundled model, in float32 so that equal means equal, for all tests of this folder."""

import pytest

from kvshrink import detach, reference_model


@pytest.fixture(scope="module")
def reference():
    model, tokenizer = reference_model("float32")
    yield model, tokenizer
    detach(model)

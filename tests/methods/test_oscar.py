import numpy as np
import torch

from kvshrink.methods._stats import LayerShape
from kvshrink.methods.quant.oscar import OSCAR, spread
from tests.methods.affine_oracle import hadamard, rounded

SHAPE = LayerShape(2, 16, torch.float32)


def test_spread_is_hadamard_with_its_columns_in_bit_reversed_order():
    want = hadamard(8)[:, [0, 4, 2, 6, 1, 5, 3, 7]]
    np.testing.assert_allclose(spread(8).numpy(), want, atol=1e-6)
    for size in (12, 20, 96):  # no power of two: still orthogonal
        torch.testing.assert_close(spread(size) @ spread(size).T, torch.eye(size), rtol=0, atol=1e-5)


def test_the_rotation_diagonalises_what_reads_keys_and_what_is_read_of_values(stats_of):
    """Against covariances added up token by token; before H and P, directions come in falling order."""
    stats = stats_of(SHAPE)
    fitted, sample = OSCAR().fit_layer(stats), stats.sample
    for head in range(2):
        queries = sample.queries_post_rope[:, 2 * head : 2 * head + 2].double()
        reads = sum(torch.outer(q, q) for q in queries.flatten(0, 1)) / len(queries)
        scores = torch.stack(
            [k @ reads @ k for k in sample.keys_post_rope[:, head].double()]
        )  # a token's, by this head
        weights = scores / scores.mean()
        value = sum(w * torch.outer(v, v) for w, v in zip(weights, sample.values[:, head].double(), strict=True))
        for matrix, second in ((fitted["key_rotation"][head], reads), (fitted["value_rotation"][head], value)):
            matrix = matrix.double() @ spread(16).double().T
            torch.testing.assert_close(matrix.T @ matrix, torch.eye(16).double(), rtol=0, atol=1e-5)
            found = matrix.T @ second @ matrix
            size = found.diagonal().abs().max()
            assert float((found - found.diagonal().diag()).abs().max() / size) < 1e-5
            assert (found.diagonal().diff() <= 1e-5 * size).all()


def test_rows_are_clipped_about_the_middle_of_their_range(stats_of):
    """And a row whose numbers all have one sign keeps them (the official int2 of others clamps its zero point)."""
    stats = stats_of(SHAPE)
    fitted = OSCAR().fit_layer(stats)
    for codec, matrix, clip in zip(
        OSCAR().codecs(SHAPE, fitted), ("key_rotation", "value_rotation"), (0.96, 0.92), strict=True
    ):
        rows = stats.sample.values[:32].transpose(0, 1)[None] + 50
        rotated = torch.einsum("bhtd,hde->bhte", rows, fitted[matrix])
        want = torch.einsum("bhte,hde->bhtd", torch.from_numpy(rounded(rotated, 2, clip)), fitted[matrix])
        back = codec.decode(codec.encode(rows, None), 2)
        assert float(((back - want).abs() > 1e-2 * want.abs().max()).float().mean()) < 0.02


def test_bits_of_a_head_of_128():
    assert OSCAR().bits_per_token(LayerShape(8, 128, torch.bfloat16), {}) / 2048 == 2.25

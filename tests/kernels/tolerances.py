"""How far a kernel may be from its reference, by the dtype that it computes in: the one place that says so."""

import torch

# norm of the difference over the norm of the reference's output, and the largest difference of a log-sum-exp
OUTPUT = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 1.2e-2}
LSE = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}


def assert_close(got, want, dtype: torch.dtype) -> None:
    """(output, log-sum-exp) of a kernel against the reference's; a row that sees nothing must be exactly 0 and -inf."""
    (out, lse), (out_wanted, lse_wanted) = got, want
    assert out.shape == out_wanted.shape
    assert lse.shape == lse_wanted.shape
    assert torch.equal(lse == -torch.inf, lse_wanted == -torch.inf)
    nothing = (lse_wanted == -torch.inf).expand_as(out)
    assert torch.equal(out[nothing], torch.zeros_like(out[nothing]))
    error = (out.float() - out_wanted).norm() / out_wanted.norm().clamp_min(1e-6)
    assert float(error) <= OUTPUT[dtype], f"relative error {float(error):.2e}"
    seen = lse_wanted.isfinite()
    if bool(seen.any()):
        assert float((lse - lse_wanted)[seen].abs().max()) <= LSE[dtype]

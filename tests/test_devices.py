"""Which precision a device computes in."""

from __future__ import annotations

import pytest
import torch

from studio.devices import precision_dtype
from studio.errors import ConfigError


@pytest.mark.parametrize(
    ("precision", "device", "has_bf16", "result"),
    [
        ("auto", "cpu", False, torch.float32),
        ("bf16", "cpu", False, torch.bfloat16),
        ("fp16", "cpu", False, "use auto or fp32"),
        ("auto", "cuda", True, torch.bfloat16),
        ("auto", "cuda", False, torch.float16),
        ("bf16", "cuda", False, "use auto, fp16 or fp32"),
    ],
)
def test_a_precision_fits_its_device(
    precision: str, device: str, has_bf16: bool, result: torch.dtype | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: has_bf16)
    if isinstance(result, torch.dtype):
        assert precision_dtype(precision, torch.device(device)) == result
    else:
        with pytest.raises(ConfigError, match=result):
            precision_dtype(precision, torch.device(device))

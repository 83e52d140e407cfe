"""The device and the precision that "auto" means."""

from __future__ import annotations

import os

import torch

from studio.errors import ConfigError

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def stored_dtype(precision: str) -> torch.dtype | None:
    """The dtype that a file's numbers are rounded to; None for fp32, which rounds nothing."""
    return None if precision == "fp32" else PRECISIONS[precision]


def best_device() -> torch.device:
    """The accelerator of this machine, or the CPU; `accelerate launch --cpu` means the CPU."""
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        return torch.device("cpu")
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def precision_dtype(precision: str, device: torch.device) -> torch.dtype:
    """fp32, fp16 or bf16 as a dtype; "auto" is bf16 on a GPU that has it, fp16 on another, fp32 elsewhere.

    Raises ConfigError for fp16 on a CPU, which has no gradient scaler, and for bf16 on a GPU that would emulate it.
    """
    has_bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError("precision is fp16, which a CPU only does slowly and inexactly: use auto or fp32")
    if precision == "bf16" and not has_bf16:
        raise ConfigError("precision is bf16, which this GPU does not have: use auto, fp16 or fp32")
    if precision != "auto":
        return PRECISIONS[precision]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if has_bf16 else torch.float16

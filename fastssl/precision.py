"""Half precision by the names that settings use."""

from __future__ import annotations

import torch

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: str, device: torch.device | str) -> torch.autocast:
    """A context with half precision where torch judges it safe; without effect for fp32."""
    return torch.autocast(torch.device(device).type, _HALF.get(precision), enabled=precision in _HALF)

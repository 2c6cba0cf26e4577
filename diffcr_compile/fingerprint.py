"""What ties a saved routing to the architecture that it was made for."""

from __future__ import annotations

import hashlib

from torch import nn


def fingerprint(model: nn.Module) -> str:
    """Hash of a model's structure: every module's name and class, every parameter's name and shape, routing left out."""
    parts = [f"{name} {type(module).__module__}.{type(module).__qualname__}" for name, module in model.named_modules()]
    parts += [f"{name} {tuple(parameter.shape)}" for name, parameter in model.named_parameters()]
    kept = [part for part in parts if "diffcr_router" not in part]
    return hashlib.sha256("\n".join(kept).encode()).hexdigest()

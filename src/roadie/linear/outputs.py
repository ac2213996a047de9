"""What a linear layer gives: a tensor of its out features, or something that cannot be rotated; and whether in new memory.

Subclasses of torch.nn.Linear may compute something else in their forward: routers of mixtures of experts give scores and logits
as a tuple, grouped projections give a part of the out features for each group. They are asked: called once on the "meta"
device, where nothing is computed and nothing allocated.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from roadie.errors import UnsupportedLayer
from roadie.linear.kinds import out_features

_ROWS = 80640  # of the trial: divisible by what layers group their rows by, 1 to 10, 12, 14, 15, 16, 18, ... 64
_TRIALS = ((_ROWS,), (2, _ROWS // 2))
_KNOWN_KINDS = {
    ("transformers.pytorch_utils", "Conv1D"),
    ("bitsandbytes.nn.modules", "Linear4bit"),
    ("bitsandbytes.nn.modules", "Linear8bitLt"),
}


def wrong_output(module: nn.Module) -> str | None:
    """Why the output of a linear layer is not a tensor of its out features; None where it is, or where that is not known.

    Layers with a forward of their own that cannot run on the "meta" device, such as quantised ones, are not known.
    """
    if not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward:
        return None
    weight = module._parameters.get("weight")
    if weight is None or not weight.is_floating_point():
        return None
    for leading in _TRIALS:
        try:
            with torch.no_grad():
                on_meta = _on_meta(module)
                given = on_meta.forward(weight.new_empty((*leading, module.in_features), device="meta"))
        except Exception:
            continue
        return _what_is_wrong(given, module)
    return None


def check_output(y: Any, module: nn.Module, path: str) -> None:
    """Raise `UnsupportedLayer` where what a linear layer gave is no tensor."""
    if not isinstance(y, Tensor):
        raise UnsupportedLayer(
            f"{path}: got {_shown(y)} from {type(module).__name__}; wanted a tensor, whose last dimension is rotated; put the "
            "layer into exclude_modules"
        )


def gives_fresh_memory(layer: nn.Module, num_hooks: int = 0) -> bool:
    """Whether a linear layer returns a new tensor each time, which nobody else holds: of a known kind, and without hooks.

    num_hooks: after its forward, of whoever asks.
    """
    weight = layer._parameters.get("weight")
    return (
        _is_of_a_known_kind(type(layer))  # type: ignore[arg-type]
        and len(layer._forward_hooks) == num_hooks
        and "forward" not in layer.__dict__  # accelerate's hooks stand there
        and not nn.modules.module._global_forward_hooks
        # No tensor subclass, which decides itself what it returns; bitsandbytes' parameters are known.
        and (type(weight) is nn.Parameter or (weight is not None and type(weight.data) is Tensor))
    )


@cache
def _is_of_a_known_kind(kind: Any) -> bool:
    return kind is nn.Linear or (kind.__module__, kind.__name__) in _KNOWN_KINDS


def _what_is_wrong(given: Any, module: nn.Module) -> str | None:
    wanted = out_features(module)
    if isinstance(given, Tensor) and given.dim() and given.shape[-1] == wanted:
        return None
    got = f"{[*given.shape[-1:]]} outputs" if isinstance(given, Tensor) else _shown(given)
    return f"{type(module).__name__} gives {got}; only a tensor of its {wanted} out features could be rotated"


def _shown(given: Any) -> str:
    return f"a {type(given).__name__}" + (f" of {len(given)}" if isinstance(given, (tuple, list)) else "")


def _on_meta(module: nn.Module) -> Any:
    """A copy of a module whose parameters and buffers have shapes alone, and which no hook knows."""
    copy = object.__new__(type(module))
    kept = {name: value for name, value in module.__dict__.items() if name not in ("forward", "_hf_hook")}
    copy.__dict__.update(kept)
    for name in ("_parameters", "_buffers"):
        tensors = module.__dict__[name].items()
        copy.__dict__[name] = {key: None if t is None else torch.empty_like(t, device="meta") for key, t in tensors}
    children = module._modules.items()
    copy.__dict__["_modules"] = {key: None if child is None else _on_meta(child) for key, child in children}
    return copy

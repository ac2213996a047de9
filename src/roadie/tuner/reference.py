"""The reference adapter of TRL's trainers: a true copy of the adapter that is trained on.

TRL's DPO, KTO, GRPO and RLOO trainers, given a PeftModel, keep its adapter "default" as it is by
``add_adapter("ref", peft_config["default"])``, and then copy what has ".default." within its name. The names of RoAd's parameters
end in ".default", so that nothing would be copied and the reference would be the base model
([decision 0021](docs/decisions/0021-reference-adapters.md)).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

logger = logging.getLogger("roadie")

SOURCE, REFERENCE = "default", "ref"  # TRL's names, 1.0 to 1.16


def is_reference(configs: Mapping[str, Any], adapter_name: str) -> bool:
    """Whether an adapter is added as TRL adds its reference: called "ref", with the very config object of "default"."""
    return adapter_name == REFERENCE and configs.get(SOURCE) is configs[REFERENCE]


@torch.no_grad()
def make_reference(model: nn.Module) -> None:
    """Give the adapter "ref" of a model what "default" has: rotations, tokens and whole modules, in their dtypes.

    That is said where a new adapter would be another one.
    """
    stores = [
        store for module in model.modules() for store in _stores(module) if SOURCE in store and REFERENCE in store
    ]
    as_new = [_is_equal(store[REFERENCE], store[SOURCE]) for store in stores]
    for store in stores:
        if isinstance(store[SOURCE], nn.Module):
            store[REFERENCE].load_state_dict(store[SOURCE].state_dict())
        else:
            store[REFERENCE].data = store[SOURCE].detach().clone()
    if not all(as_new):
        logger.warning(
            "adapter %r starts as a copy of %r, whose config object it was given: the reference of TRL's trainers; for an "
            "adapter that starts anew give it a config of its own, or another name",
            REFERENCE,
            SOURCE,
        )


def _stores(module: nn.Module) -> list[Any]:
    """What a module keeps by the names of adapters: whole modules, or parameters."""
    if isinstance(module, ModulesToSaveWrapper):
        return [module.modules_to_save]
    return [getattr(module, name) for name in module.adapter_layer_names] if isinstance(module, BaseTunerLayer) else []


def _is_equal(one: Any, other: Any) -> bool:
    if isinstance(one, nn.Module):
        ours, theirs = one.state_dict(), other.state_dict()
        return ours.keys() == theirs.keys() and all(_is_equal(ours[key], theirs[key]) for key in ours)
    return (one.dtype, one.device) == (other.dtype, other.device) and torch.equal(one, other)

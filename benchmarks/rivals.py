"""What is compared: the frozen model, roadie, and PEFT's RoAd, LoRA and (IA)3, each checked to be what its name says.

"roadie, 2 stages" rotates twice in a row, over other pairs each time.

Rivals share their base weights, the very same memory, so that none has luckier pages than another. Adapters get a little
noise, since an adapter that does nothing might be cheaper than one that does something.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import torch
from peft.tuners.ia3.layer import IA3Layer
from peft.tuners.lora.layer import LoraLayer
from torch import nn

import roadie
from roadie.rotation import parameter_size
from roadie.testing import stock_peft
from roadie.testing.rival import is_stock

FROZEN, AGAIN, ROADIE = "frozen", "frozen again", "roadie"
PEFT_ROAD, PEFT_LORA, PEFT_IA3 = "PEFT RoAd", "PEFT LoRA r=8", "PEFT (IA)3"
ADAPTERS = (ROADIE, PEFT_ROAD, PEFT_LORA, PEFT_IA3)
RIVALS = (FROZEN, *ADAPTERS)
ROADIE_STAGES = "roadie, 2 stages"
ROADIE_TRAINABLE = "roadie, trainable"  # in a forward without gradients, where the others' adapters are frozen
RANK = 8
GROUP_SIZE = 64  # PEFT's default
STAGES = (2, GROUP_SIZE)


@dataclass(frozen=True)
class Precision:
    """The dtype of the base weights and activations, and that of the adapter."""

    base: torch.dtype
    adapter: torch.dtype


PRECISIONS = {
    "fp32": Precision(torch.float32, torch.float32),
    "bf16": Precision(torch.bfloat16, torch.bfloat16),
    "bf16, fp32 adapter": Precision(torch.bfloat16, torch.float32),
}


def adapt(model: nn.Module, rival: str, targets: Any, precision: Precision, variant: str = "road_1") -> nn.Module:
    """Freeze `model` and add the rival's adapter to its modules `targets` (in place); the result is checked."""
    model.requires_grad_(False)
    if rival not in (FROZEN, AGAIN):
        # PEFT keeps adapters of half-precision models in float32 unless it is told not to.
        autocast = precision.adapter == torch.float32
        model = _MAKERS[rival](model, targets, variant, autocast)
        _add_noise(model)
    check_rival(model, rival, precision)
    return model


def _roadie(model: Any, targets: Any, variant: str, autocast: bool) -> Any:
    config = roadie.RoadConfig(variant=variant, group_size=GROUP_SIZE, target_modules=targets)
    return roadie.get_peft_model(model, config, autocast_adapter_dtype=autocast)


def _roadie_stages(model: Any, targets: Any, variant: str, autocast: bool) -> Any:
    config = roadie.RoadConfig(variant=variant, stages=list(STAGES), target_modules=targets)
    return roadie.get_peft_model(model, config, autocast_adapter_dtype=autocast)


def _peft_road(model: Any, targets: Any, variant: str, autocast: bool) -> Any:
    with stock_peft() as stock_config:
        config = stock_config(variant=variant, group_size=GROUP_SIZE, target_modules=targets)
        return peft.get_peft_model(model, config, autocast_adapter_dtype=autocast)


def _peft_lora(model: Any, targets: Any, variant: str, autocast: bool) -> Any:
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules=targets)
    return peft.get_peft_model(model, config, autocast_adapter_dtype=autocast)


def _peft_ia3(model: Any, targets: Any, variant: str, autocast: bool) -> Any:
    # No feed-forward modules: each output is scaled, the counterpart of rotating each output.
    config = peft.IA3Config(target_modules=targets, feedforward_modules=[])
    return peft.get_peft_model(model, config, autocast_adapter_dtype=autocast)


_MAKERS: dict[str, Callable[[Any, Any, str, bool], Any]] = {
    ROADIE: _roadie,
    ROADIE_STAGES: _roadie_stages,
    ROADIE_TRAINABLE: _roadie,
    PEFT_ROAD: _peft_road,
    PEFT_LORA: _peft_lora,
    PEFT_IA3: _peft_ia3,
}


def _add_noise(model: nn.Module, scale: float = 0.02) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trained(model):
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.add_(noise.to(parameter.device, parameter.dtype))


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are trained: the adapter's."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def check_rival(model: nn.Module, rival: str, precision: Precision) -> None:
    """Assert that every adapted layer of `model` is the rival's, and the dtype of what is trained."""
    assert _IS[rival](model), f"this is not {rival}: {model}"
    dtypes = {parameter.dtype for parameter in trained(model)}
    wanted = set() if rival in (FROZEN, AGAIN) else {precision.adapter}
    assert dtypes == wanted, f"{rival}: got adapter parameters in {dtypes}; wanted {wanted}"


def _layers(model: nn.Module, kind: type) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, kind)]


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that adapters were added to, whichever method's, by their path in the base model."""
    kind = peft.tuners.tuners_utils.BaseTunerLayer
    found = {name: module for name, module in model.named_modules() if isinstance(module, kind)}
    return {name.removeprefix("base_model.model."): module for name, module in found.items()}


def _is_roadie(model: nn.Module) -> bool:
    return _has_stages(model, 1)


def _is_roadie_stages(model: nn.Module) -> bool:
    return _has_stages(model, len(STAGES))


def _has_stages(model: nn.Module, count: int) -> bool:
    """Whether all adapted layers are roadie's, with parameters for `count` rotations in a row."""
    layers = _layers(model, roadie.RoadLayer)
    return bool(layers) and not is_stock(model) and all(_stages_in(layer) == count for layer in layers)


def _stages_in(layer: Any) -> float:
    """How many rotations in a row the number of a layer's parameters is that of."""
    ((name, theta),) = layer.road_theta.items()
    return theta.numel() / parameter_size(layer.variant[name], layer.out_features)


def _is_lora(model: nn.Module) -> bool:
    layers = _layers(model, LoraLayer)
    return bool(layers) and all(layer.r == {"default": RANK} for layer in layers)


def _is_ia3(model: nn.Module) -> bool:
    layers = _layers(model, IA3Layer)
    return bool(layers) and not any(layer.is_feedforward for layer in layers)


def _is_bare(model: nn.Module) -> bool:
    return not any(isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer) for module in model.modules())


_IS: dict[str, Callable[[nn.Module], bool]] = {
    FROZEN: _is_bare,
    AGAIN: _is_bare,
    ROADIE: _is_roadie,
    ROADIE_STAGES: _is_roadie_stages,
    ROADIE_TRAINABLE: _is_roadie,
    PEFT_ROAD: is_stock,
    PEFT_LORA: _is_lora,
    PEFT_IA3: _is_ia3,
}


def layer_of(
    weight: nn.Parameter, rival: str, precision: Precision, variant: str = "road_1"
) -> tuple[nn.Module, list[nn.Parameter]]:
    """A linear layer over `weight` ``[out, in]`` as its parent model would call it, and what is trained of it."""
    out_features, in_features = weight.shape
    holder = nn.Sequential()
    linear = nn.Linear(in_features, out_features, bias=False, device="meta")
    linear.weight = weight
    holder.add_module("linear", linear)
    model = adapt(holder, rival, ["linear"], precision, variant)
    layer = holder.linear
    assert any(base.weight is weight for base in _layers(layer, nn.Linear)), f"{rival} has a weight of its own"
    return layer, trained(model)


def sharing_copy(model: nn.Module) -> Any:
    """A copy of `model` whose parameters are the same memory: to be adapted in its own way."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def random_weight(out_features: int, in_features: int, dtype: torch.dtype, device: str = "cpu") -> nn.Parameter:
    """A frozen weight ``[out, in]`` drawn on the device from N(0, 1/in); equal for equal sizes."""
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(out_features, in_features, generator=generator, device=device) * in_features**-0.5
    return nn.Parameter(weight.to(dtype), requires_grad=False)

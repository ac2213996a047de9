"""Ways to a better RoAd, as methods like any other: at which rates, where to rotate, and from where to start.

They have about as many parameters as road_1 on all linear layers (road_2_from_lora: as road_2), so that what is better is so for
where they are. Names of layers are Llama's, which most language models share.
"""

from __future__ import annotations

from typing import Any

import peft
import torch
from torch import Tensor, nn

import roadie
from benchmarks.quality.methods import GROUP_SIZE, METHODS, ROAD, Adapt, Method
from benchmarks.quality.tasks import LANGUAGE, Task, tally
from benchmarks.quality.training import CLIPPED_AT, batches

ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
FACTOR = 3.2
"""By which rates are apart: a step of the grid."""
LORA_STEPS, LORA_RATE = 40, 3.2e-3
"""Before a fit: steps of one piece of rows, which is a quarter of what a step of real.yaml has."""
NAME = "default"


def _road(variant: str, **settings: Any) -> Adapt:
    def adapt(model: nn.Module, task: Task) -> nn.Module:
        given = {"target_modules": task.targets, **settings}
        return roadie.get_peft_model(model, roadie.RoadConfig(variant=variant, group_size=GROUP_SIZE, **given))

    return adapt


def _half(variant: str, last: bool) -> Adapt:
    """All linear layers of the first or the last half of the blocks."""

    def adapt(model: Any, task: Task) -> nn.Module:
        count = model.config.get_text_config().num_hidden_layers
        chosen = range(count // 2, count) if last else range(count // 2)
        return _road(variant, layers_to_transform=list(chosen))(model, task)

    return adapt


def _from_lora(variant: str) -> Adapt:
    """The closed-form fit to a LoRA adapter that was trained for LORA_STEPS."""

    def adapt(model: Any, task: Task) -> nn.Module:
        lora: Any = METHODS["lora_r8"].adapt(model, task)
        _learn(lora, task)
        fitted = {path: fit(layer, variant) for path, layer in lora.get_base_model().named_modules() if _is_lora(layer)}
        road: Any = METHODS[variant].adapt(lora.unload(), task)
        for path, (theta, alpha) in fitted.items():
            layer = road.get_base_model().get_submodule(path)
            with torch.no_grad():
                layer.road_theta[NAME].copy_(theta)
                layer.road_alpha[NAME].copy_(alpha)
        return road

    return adapt


def _is_lora(module: nn.Module) -> bool:
    return isinstance(module, peft.tuners.lora.LoraLayer)


def fit(layer: Any, variant: str) -> tuple[Tensor, Tensor]:
    """Theta and alpha ``[n]`` whose rotation of the base layer's outputs is nearest to what its LoRA adapter does."""
    base = layer.get_base_layer()
    weight = base.weight.detach()
    after = weight + layer.get_delta_weight(NAME).detach()
    if base.bias is not None:
        weight, after = (torch.cat((one, base.bias.detach()[:, None]), dim=1) for one in (weight, after))
    rotation = roadie.fit.best_rotation(roadie.fit.moments(weight, after, GROUP_SIZE), variant)
    return roadie.to_parameters(rotation, variant)


def _learn(model: nn.Module, task: Task) -> None:
    """A short training at a constant rate; the same rows whatever the seed."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LORA_RATE, weight_decay=0.0)
    rows = batches(task, seed=0)
    model.eval()
    for _ in range(LORA_STEPS):
        batch = {name: tensor.to(parameters[0].device) for name, tensor in next(rows).items()}
        tally(task, model, batch).loss.backward()
        nn.utils.clip_grad_norm_(parameters, CLIPPED_AT)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _direction(name: str, adapt: Adapt, kept: float = 2.0, **settings: Any) -> Method:
    return Method(name, ROAD, adapt, {LANGUAGE: -4}, kept, kinds=(LANGUAGE,), **settings)


# With road_4 on its layers of few outputs, attention or the MLP has as many parameters as road_1 has everywhere: of the 5,184 of
# a block of SmolLM2, 1.04 times, both. What is kept of them is that model's too.
ATTENTION_KEPT, MLP_KEPT = 3_072 / 5_376, 7_296 / 5_376
DIRECTIONS = {
    method.name: method
    for method in (
        _direction("road_1_scales_faster", METHODS["road_1"].adapt, rate_shares={"road_alpha": FACTOR}),
        _direction("road_1_scales_slower", METHODS["road_1"].adapt, rate_shares={"road_alpha": 1 / FACTOR}),
        _direction("road_2_first_half", _half("road_2", last=False), 1.0),
        _direction("road_2_last_half", _half("road_2", last=True), 1.0),
        _direction(
            "road_attention",
            _road("road_4", target_modules=ATTENTION, variant_pattern={"k_proj": "road_2", "v_proj": "road_2"}),
            ATTENTION_KEPT,
        ),
        _direction("road_mlp", _road("road_1", target_modules=MLP, variant_pattern={"down_proj": "road_4"}), MLP_KEPT),
        _direction("road_1_from_lora", _from_lora("road_1")),
        _direction("road_2_from_lora", _from_lora("road_2"), 1.0),
    )
}

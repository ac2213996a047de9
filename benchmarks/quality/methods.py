"""The methods, a line each: what PEFT (for RoAd: roadie) makes of a model, and the learning rate the search starts from.

Rates are exponents of the grid ``rate(n) = 10 ** (n / 2)``: -4 is 1e-2, -3 is 3.2e-2. A search goes on from its first
guess until the best rate has a worse one on both sides, so a guess costs time, not quality.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import peft
from torch import nn

import roadie
from benchmarks.quality import tried
from benchmarks.quality.tasks import CLASSIFICATION, LANGUAGE, Task

GROUP_SIZE = 64
Adapt = Callable[[nn.Module, Task], nn.Module]


@dataclass(frozen=True)
class Method:
    """One way to adapt a model.

    first: exponent of the first rate by kind of task; kept_per_parameter: float32 numbers a server keeps for a trained
    one (RoAd is served as direct and cross, whatever its variant); rate_shares: of the run's learning rate, by a part of the
    names of the parameters that have a rate of their own, which configurations alone look at (`hub`).
    """

    name: str
    family: str
    adapt: Adapt
    first: Mapping[str, int]
    kept_per_parameter: float = 1.0
    kinds: tuple[str, ...] = (LANGUAGE, CLASSIFICATION)
    needs_head: bool = False
    rate_shares: Mapping[str, float] = field(default_factory=dict)

    def suits(self, task: Task) -> bool:
        """Whether the method has something to train on the task."""
        return task.kind in self.kinds and (bool(task.head) or not self.needs_head)


def rate(exponent: int) -> float:
    """A learning rate of the grid: 10 ** (exponent / 2), two digits."""
    return float(f"{10 ** (exponent / 2):.2g}")


def nearest_exponent(learning_rate: float) -> int:
    """The exponent of the grid whose rate is nearest."""
    return round(2 * math.log10(learning_rate))


def _through_peft(config: type, **settings: Any) -> Adapt:
    def adapt(model: nn.Module, task: Task) -> nn.Module:
        given = {"target_modules": task.targets, "modules_to_save": list(task.head) or None, **settings}
        return peft.get_peft_model(model, config(**given))

    return adapt


def _road(variant: str, group_size: int = GROUP_SIZE, **settings: Any) -> Adapt:
    def adapt(model: nn.Module, task: Task) -> nn.Module:
        config = roadie.RoadConfig(
            variant=variant,
            group_size=group_size,
            modules_to_save=list(task.head) or None,
            **{"target_modules": task.targets, **settings},
        )
        return roadie.get_peft_model(model, config)

    return adapt


def _everything(model: nn.Module, task: Task) -> nn.Module:
    return model.requires_grad_(True)


def _head_only(model: nn.Module, task: Task) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(task.head))
    return model


def _with(adapt: Adapt, more: Adapt) -> Adapt:
    return lambda model, task: more(adapt(model, task), task)


def _rates(language: int, classification: int) -> dict[str, int]:
    return {LANGUAGE: language, CLASSIFICATION: classification}


def _lora(rank: int, **settings: Any) -> Adapt:
    return _through_peft(peft.LoraConfig, r=rank, lora_alpha=2 * rank, lora_dropout=0.0, **settings)


# Of a language model: what "all-linear" leaves out is the layer that gives the logits.
WITH_LAST = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
INPUTS = {"input_stages": [GROUP_SIZE]}
# road_2, but a layer with as many outputs as the vocabulary has tokens gets road_1, and its input is rotated.
LAST = {
    "target_modules": WITH_LAST,
    "variant_pattern": {"lm_head": "road_1"},
    "input_stages_pattern": {"lm_head": [GROUP_SIZE]},
}
LAST_KEPT = 26_112 / 23_808  # of the embedded model: 21,504 parameters of road_2, 2,304 of road_1

ROAD, LORA, OTHER, TRIED = "RoAd", "LoRA", "other", "tried, not built in"

METHODS = {
    method.name: method
    for method in (
        Method("road_1", ROAD, _road("road_1"), _rates(-3, -4), kept_per_parameter=2.0),
        Method("road_2", ROAD, _road("road_2"), _rates(-3, -4)),
        Method("road_4", ROAD, _road("road_4"), _rates(-3, -4), kept_per_parameter=0.5),
        Method("lora_r1", LORA, _lora(1), _rates(-4, -5)),
        Method("lora_r4", LORA, _lora(4), _rates(-4, -5)),
        Method("ia3", OTHER, _through_peft(peft.IA3Config, target_modules=None), _rates(-2, -3)),
        Method(
            "road_1_last",
            ROAD,
            _road("road_1", target_modules=WITH_LAST),
            _rates(-4, -4),
            kept_per_parameter=2.0,
            kinds=(LANGUAGE,),
        ),
        Method("road_2_last", ROAD, _road("road_2", **LAST), _rates(-4, -4), LAST_KEPT, kinds=(LANGUAGE,)),
        Method("lora_r1_last", LORA, _lora(1, target_modules=WITH_LAST), _rates(-4, -5), kinds=(LANGUAGE,)),
        Method("road_1_input", ROAD, _road("road_1", **INPUTS), _rates(-4, -5), kept_per_parameter=2.0),
        Method("road_4_input", ROAD, _road("road_4", **INPUTS), _rates(-4, -5), kept_per_parameter=0.5),
        Method(
            "road_1_input_last",
            ROAD,
            _road("road_1", target_modules=WITH_LAST, **INPUTS),
            _rates(-4, -5),
            kept_per_parameter=2.0,
            kinds=(LANGUAGE,),
        ),
        Method("road_1_stages_2", ROAD, _road("road_1", stages=[2, 64]), _rates(-3, -4), kept_per_parameter=2.0),
        Method("road_2_stages_3", ROAD, _road("road_2", stages=[2, 16, 64]), _rates(-3, -4)),
        Method("road_2_stages_4", ROAD, _road("road_2", stages=[2, 8, 32, 64]), _rates(-3, -4)),
        Method("road_2_group_2", ROAD, _road("road_2", group_size=2), _rates(-3, -4)),
        Method("road_2_group_32", ROAD, _road("road_2", group_size=32), _rates(-3, -4)),
        Method("lora_r2", LORA, _lora(2), _rates(-4, -5)),
        Method("lora_r8", LORA, _lora(8), _rates(-4, -5)),
        Method("lora_r16", LORA, _lora(16), _rates(-4, -5)),
        Method("dora_r1", OTHER, _lora(1, use_dora=True), _rates(-4, -5)),
        Method("oft_4", OTHER, _through_peft(peft.OFTConfig, oft_block_size=4, r=0), _rates(-4, -5)),
        Method("vera_r256", OTHER, _through_peft(peft.VeraConfig, r=256), _rates(-3, -4)),
        Method("full", OTHER, _everything, _rates(-6, -7)),
        Method("probe", OTHER, _head_only, _rates(0, -4), kinds=(CLASSIFICATION,), needs_head=True),
        Method("road_1_shift", TRIED, _with(_road("road_1"), tried.shift_layers), _rates(-3, -5)),
        Method("road_2_norms", TRIED, _with(_road("road_2"), tried.train_norms), _rates(-3, -4)),
        Method("lora_r1_norms", TRIED, _with(_lora(1), tried.train_norms), _rates(-4, -5)),
        Method(
            "road_1_last_shift",
            TRIED,
            _with(_road("road_1"), tried.shift_output_layer),
            _rates(-3, -4),
            kinds=(LANGUAGE,),
        ),
        Method(
            "lora_r1_last_shift", TRIED, _with(_lora(1), tried.shift_output_layer), _rates(-4, -5), kinds=(LANGUAGE,)
        ),
    )
}

MINIMUM = ("road_1", "road_2", "road_4", "lora_r1", "lora_r4", "ia3")
CAPACITY = (
    "road_2_last",
    "lora_r1_last",
    "road_1_last",
    "road_1_input",
    "road_4_input",
    "road_1_input_last",
    "road_2_stages_4",
    "road_1_stages_2",
)

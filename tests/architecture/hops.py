"""Which functions of roadie run in a step of an adapted model: the hops that a reader follows, and that Python takes time for.

`SCENARIOS` make steps, functions without arguments, each of a new model of so many adapted layers.
"""

from __future__ import annotations

import gc
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn

import roadie

PACKAGE = str(Path(roadie.__file__).parent)
WIDTH = 64
ROWS = ("default", "other", "default", "__base__")

Step = Callable[[], object]


def codes_run_by(step: Step) -> list[CodeType]:
    """The code of every function of roadie that is called in `step`, in order; a generator counts each time it goes on."""
    codes = []

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            codes.append(frame.f_code)

    before = sys.getprofile()
    gc.collect()  # now, and not in between: what becomes of models that others left is none of the step
    gc.disable()
    sys.setprofile(note)
    try:
        step()
    finally:
        sys.setprofile(before)
        gc.enable()
    return codes


def from_the_layer_on(codes: list[CodeType]) -> list[CodeType]:
    """What is left of `codes` from the forward of the first layer on."""
    return codes[codes.index(roadie.Linear.forward.__code__) :]


def files_of(codes: list[CodeType]) -> set[str]:
    return {code.co_filename for code in codes}


def told(codes: list[CodeType]) -> str:
    """A line a call."""
    lines = (f"{Path(code.co_filename).relative_to(PACKAGE)}:{code.co_firstlineno} {code.co_name}" for code in codes)
    return "\n".join(lines)


def adapted(layers: int, **settings: Any) -> Any:
    """A chain of linear layers with a random adapter on each."""
    torch.manual_seed(0)
    chain = nn.Sequential(OrderedDict((f"layer{i}", nn.Linear(WIDTH, WIDTH)) for i in range(layers)))
    return roadie.get_peft_model(chain, config(**settings))


def config(**settings: Any) -> roadie.RoadConfig:
    sizes = {} if "stages" in settings else {"group_size": 8}
    return roadie.RoadConfig(target_modules=r"layer\d+", init_weights=False, **sizes, **settings)


def batch() -> Tensor:
    return torch.randn(len(ROWS), WIDTH, generator=torch.Generator().manual_seed(1))


def first_inference(layers: int) -> Step:
    model, x = adapted(layers).eval(), batch()
    return lambda: inferred(model, x)


def repeated_inference(layers: int) -> Step:
    return run_before(first_inference(layers))


def training(layers: int) -> Step:
    """Forward and backward, with the parameters of the step before."""
    model, x = adapted(layers), batch()
    return run_before(lambda: trained(model, x))


def training_on(layers: int) -> Step:
    """Forward and backward, with parameters that an optimiser has changed."""
    model, x = adapted(layers), batch()
    trained(model, x)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    return lambda: trained(model, x)


def two_stages_training(layers: int) -> Step:
    model, x = adapted(layers, stages=[2, 16]), batch()
    return run_before(lambda: trained(model, x))


def mixed_inference(layers: int) -> Step:
    model, x = with_another(adapted(layers)).eval(), batch()

    def step() -> None:
        with torch.no_grad(), roadie.rows(model, list(ROWS)):
            model(x)

    return run_before(step)


def mixed_training(layers: int) -> Step:
    model, x = with_another(adapted(layers)), batch()

    def step() -> None:
        with roadie.rows(model, list(ROWS)):
            trained(model, x)

    return run_before(step)


def run_before(step: Step) -> Step:
    step()
    return step


def with_another(model: Any) -> Any:
    """The model with a second adapter; both are to be trained, so that it does not matter which is looked at first."""
    model.add_adapter("other", config())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("road_" in name)
    return model


def inferred(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        model(x)


def trained(model: nn.Module, x: Tensor) -> None:
    model(x).sum().backward()


SCENARIOS: dict[str, Callable[[int], Step]] = {
    made.__name__: made
    for made in (
        first_inference,
        repeated_inference,
        training,
        training_on,
        two_stages_training,
        mixed_inference,
        mixed_training,
    )
}

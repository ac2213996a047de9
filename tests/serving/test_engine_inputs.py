"""The engine serves adapters that rotate the inputs of layers beside plain ones: each row is the merged model's."""

from __future__ import annotations

import copy
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from benchmarks.greedy import GreedyReference, GreedyVerdict
from tests.serving.harness import prompt, save_all, serving

import roadie
from roadie.adapter import INPUT_SUFFIX, Adapter, LayerParameters
from roadie.rotation import to_dense
from roadie.serving import EngineSettings, FinishReason
from roadie.serving.validation import last_layer_sites

SETTINGS = EngineSettings(num_slots=6, page_size=8, num_blocks=128)
pytestmark = pytest.mark.filterwarnings("ignore:this adapter")


def with_inputs(
    adapter: Adapter, model: Any, seed: int, stages: list[int], input_stages: list[int], more: tuple[str, ...] = ()
) -> Adapter:
    """An adapter of the same layers, and of `more`, that has these rotations of each layer's output and input."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for path in (*adapter.layers, *more):
        out_features, in_features = model.get_submodule(path).weight.shape
        for site, width, sizes in ((path, out_features, stages), (f"{path}{INPUT_SUFFIX}", in_features, input_stages)):
            theta, alpha = (0.2 * torch.randn(len(sizes) * width // 2, generator=generator) for _ in range(2))
            layers[site] = LayerParameters(theta, 1 + alpha, "road_1", sizes)
    return Adapter(layers, {"peft_type": "ROAD", "variant": "road_1", "stages": stages, "input_stages": input_stages})


def merged(model: Any, adapter: Adapter | None) -> Any:
    """A copy of the model with dense products in place of its weights."""
    model = copy.deepcopy(model)
    for path, layer in adapter.layers.items() if adapter is not None else ():
        weight = model.get_submodule(path.removesuffix(INPUT_SUFFIX)).weight
        for rotation in layer.rotations if not path.endswith(INPUT_SUFFIX) else reversed(layer.rotations):
            dense = to_dense(rotation).double()
            turned = weight.data.double() @ dense if path.endswith(INPUT_SUFFIX) else dense @ weight.data.double()
            weight.data = turned.to(weight.dtype)
    return model


def check(model: Any, root: Path, wishes: dict[str, tuple[Any, Adapter | None]]) -> None:
    """Each wish is served twice, all at once; the tokens are those of the adapter beside it, merged."""
    with serving(model, root, SETTINGS) as collector:
        asked = {}
        for place, name in enumerate([*wishes, *wishes]):
            prompt_ids = prompt(place, 5 + 2 * place)
            asked[collector.submit(prompt_ids, wishes[name][0], max_tokens=8)] = (prompt_ids, name)
        collector.wait()
    assert not any(module._forward_pre_hooks for module in model.modules())
    verdict = GreedyVerdict()
    references = {name: GreedyReference(merged(model, adapter), {}) for name, (_, adapter) in wishes.items()}
    for request_id, (prompt_ids, name) in asked.items():
        assert collector.last(request_id).finish is FinishReason.LENGTH, collector.last(request_id)
        verdict += references[name].check(prompt_ids, None, collector.tokens(request_id))
    assert (verdict.num_tokens, verdict.num_wrong) == (8 * len(asked), 0)


def test_rotated_inputs_come_and_go_beside_plain_adapters(model: Any, adapters: Any, root: Path) -> None:
    plain = adapters["a0"]
    wide = with_inputs(plain, model, 1, [16], [8])
    deep = with_inputs(plain, model, 2, [2, 16], [16, 4])
    save_all({"wide": wide, "deep": deep}, root)
    wishes: dict[str, tuple[Any, Adapter | None]] = {
        "plain": ("a0", plain),
        "wide": ("wide", wide),
        "none": (None, None),
        "deep": ("deep", deep),
        "half": ({"wide": 0.5}, roadie.power(wide, 0.5)),
        "undone": ({"deep": -1.0}, roadie.inverse(deep)),
        "both": ({"wide": 0.5, "a0": 0.5}, roadie.mean([wide, plain])),
    }
    check(model, root, wishes)


def test_the_input_of_the_last_layer_is_rotated_too(model: Any, adapters: Any, root: Path) -> None:
    wide = with_inputs(adapters["a0"], model, 3, [16], [8], more=("lm_head",))
    head = Adapter({path: layer for path, layer in wide.layers.items() if path.startswith("lm_head")}, wide.config)
    save_all({"head": head}, root)
    assert last_layer_sites(model) == {"lm_head", "lm_head.road_input"}
    check(model, root, {"head": ("head", head), "plain": ("a1", adapters["a1"]), "none": (None, None)})


def test_a_step_that_began_before_the_last_layer_was_adapted_ends_as_it_began(model: Any, root: Path) -> None:
    """Adapters are loaded in a thread of their own: it asks for all logits while the model computes, and waits."""
    asked: list[Thread] = []
    with serving(model, root, SETTINGS) as collector:
        batch = collector.engine._batch

        def ask(*_: Any) -> None:
            if not asked:
                asked.append(Thread(target=batch.keep_all_logits))
                asked[0].start()
                while not batch._keeps_all and not batch._computing.locked():
                    pass  # it has asked, or it waits for the step to end

        handle = model.register_forward_pre_hook(ask)
        request_id = collector.submit(prompt(0, 9), None, max_tokens=4)
        collector.wait()
        handle.remove()
        asked[0].join()
        assert batch._keeps_all
        assert collector.last(request_id).finish is FinishReason.LENGTH, collector.last(request_id)

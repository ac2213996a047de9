"""From two models that run on a text: planted rotations are found, and the three kinds of input are what they say."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from roadie import fit
from roadie.adapter import Adapter
from roadie.errors import AdapterError, ConfigError, UnsupportedLayer
from roadie.rotation import from_parameters, rotate, rotate_weight

G = 4
INPUTS = ("wanted", "base", "adapted")


class Net(nn.Module):
    """Two layers that share an input, one after them, a head; and a layer that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 12)
        self.q = nn.Linear(12, 8)
        self.k = Conv1D(8, 12)
        self.after = nn.Linear(8, 16, bias=False)
        self.unused = nn.Linear(8, 8)
        self.lm_head = nn.Linear(16, 50)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        return self.lm_head(torch.tanh(self.after(torch.tanh(self.q(x) * self.k(x)))))


def nets() -> tuple[Net, Net, dict[str, Any]]:
    """A net, the same with three layers turned, and their rotations."""
    base = Net().eval()
    wanted, rotations = copy.deepcopy(base), {}
    for path in ("q", "k", "after"):
        module = wanted.get_submodule(path)
        outputs = module.nf if isinstance(module, Conv1D) else module.out_features
        theta, alpha = 0.4 * torch.randn(2, outputs)
        rotations[path] = from_parameters(theta, 1 + alpha, "road_2", G)
        with torch.no_grad():
            module.weight.copy_(rotate_weight(module.weight, rotations[path], dim=int(isinstance(module, Conv1D))))
            if module.bias is not None:
                module.bias.copy_(rotate_weight(module.bias, rotations[path]))
    return base, wanted, rotations


def batches(count: int = 3) -> list[Tensor]:
    return [torch.randint(50, (4, 10)) for _ in range(count)]


def run(base: nn.Module, wanted: nn.Module, text: Any, inputs: str = "adapted", **settings: Any) -> fit.Fit:
    return fit.from_activations(base, wanted, text, inputs=inputs, group_size=G, **settings)


@pytest.mark.parametrize("inputs", ["wanted", "adapted"])
def test_planted_rotations_are_found(inputs) -> None:
    base, wanted, rotations = nets()
    found = run(base, wanted, batches(), inputs)
    assert set(found.adapter.layers) == {"q", "k", "after"}
    for path, rotation in rotations.items():
        got = found.adapter.layers[path].rotation
        # Outputs in float32, over the condition of two outputs on 120 tokens.
        torch.testing.assert_close(got.direct, rotation.direct, rtol=0, atol=1e-5)
        torch.testing.assert_close(got.cross, rotation.cross, rtol=0, atol=1e-5)
        assert found.layers[path].share_explained > 1 - 1e-9
    assert found.layers["unused"].kept is False
    assert "lm_head" not in found.layers


def test_from_the_base_a_later_layer_also_learns_what_came_before_it() -> None:
    base, wanted, rotations = nets()
    text = batches()
    found = run(base, wanted, text, "base")
    torch.testing.assert_close(found.adapter.layers["q"].rotation.direct, rotations["q"].direct, rtol=0, atol=1e-5)
    outputs = [after_of(model, text) for model in (base, wanted)]
    best = fit.best_rotation(fit.moments(outputs[0].T, outputs[1].T, G), "road_2")
    torch.testing.assert_close(found.adapter.layers["after"].rotation.direct, best.direct.float(), rtol=0, atol=1e-5)
    assert float((best.direct - rotations["after"].direct).abs().max()) > 0.01


def after_of(model: Net, text: list[Tensor], adapter: Adapter | None = None) -> Tensor:
    """Outputs of the layer `after` on all tokens, with the rotations of `adapter` before it."""

    def turned(path: str, y: Tensor) -> Tensor:
        return y if adapter is None else rotate(y, adapter.layers[path].rotation)

    with torch.no_grad():
        x = torch.cat([model.embed(ids) for ids in text])
        return model.after(torch.tanh(turned("q", model.q(x)) * turned("k", model.k(x)))).flatten(0, 1)


def test_adapted_inputs_are_those_of_the_layers_fitted_before() -> None:
    """With a wanted model that is no rotation of the base."""
    base, wanted, text = Net().eval(), Net().eval(), batches()
    found = run(base, wanted, text)
    before, after = after_of(base, text, found.adapter), after_of(wanted, text)
    best = fit.best_rotation(fit.moments(before.T, after.T, G), "road_2")
    torch.testing.assert_close(found.adapter.layers["after"].rotation.direct, best.direct.float(), rtol=0, atol=1e-5)
    by_itself = run(base, wanted, text, "wanted").adapter
    assert float((by_itself.layers["after"].rotation.direct - best.direct).abs().max()) > 0.01


def test_by_themselves_layers_get_what_reaches_the_wanted_model() -> None:
    base, wanted, text = Net().eval(), Net().eval(), batches()
    found = run(base, wanted, text, "wanted")
    with torch.no_grad():
        x = torch.cat([wanted.embed(ids) for ids in text]).flatten(0, 1)
        best = fit.best_rotation(fit.moments(base.q(x).T, wanted.q(x).T, G), "road_2")
    torch.testing.assert_close(found.adapter.layers["q"].rotation.direct, best.direct.float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("inputs", INPUTS)
def test_padding_does_not_count(inputs) -> None:
    base, wanted, text = Net().eval(), Net().eval(), batches(1)[0]
    mask = torch.ones_like(text)
    mask[1, :4] = 0
    mask[3, :9] = 0
    padded = [{"input_ids": text, "attention_mask": mask}]
    plain = [text[row, mask[row].bool()][None] for row in range(4)]
    one, other = (run(base, wanted, each, inputs).adapter for each in (padded, plain))
    for path in one.layers:
        torch.testing.assert_close(
            one.layers[path].rotation.direct, other.layers[path].rotation.direct, rtol=1e-4, atol=1e-5
        )
    counted = run(base, wanted, [text], inputs).adapter
    assert float((counted.layers["q"].rotation.direct - one.layers["q"].rotation.direct).abs().max()) > 1e-3


@pytest.mark.parametrize("inputs", INPUTS)
def test_the_models_are_left_as_they_were(inputs) -> None:
    base, wanted, _ = nets()
    states = [copy.deepcopy(model.state_dict()) for model in (base, wanted)]
    run(base, wanted, batches(), inputs)
    broken = copy.deepcopy(wanted)
    broken.q.bias.data.fill_(torch.inf)
    with pytest.raises(AdapterError, match="not finite"):
        run(base, broken, batches(), inputs)
    assert not any(module._forward_hooks for module in broken.modules())
    for model, state in zip((base, wanted), states, strict=True):
        assert not any(module._forward_hooks for module in model.modules())
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_the_wanted_model_may_be_a_peft_model() -> None:
    base = Net().eval()
    model = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(target_modules=["q", "k"], init_lora_weights=False, fan_in_fan_out=False)
    ).eval()
    text = batches()
    found = run(base, model, text)
    merged = run(base, copy.deepcopy(model).merge_and_unload(), text)
    for path in found.adapter.layers:
        torch.testing.assert_close(
            found.adapter.layers[path].rotation.direct, merged.adapter.layers[path].rotation.direct, rtol=0, atol=1e-4
        )
    assert {path for path, layer in found.layers.items() if layer.change > 1e-3} == {"q", "k", "after"}


def test_a_module_that_runs_twice_counts_twice() -> None:
    class Twice(nn.Module):
        def __init__(self, inner: nn.Linear) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(torch.tanh(self.inner(x)))

    base, wanted = (Twice(nn.Linear(8, 8)) for _ in range(2))
    text = [torch.randn(5, 8) for _ in range(2)]
    pairs = []
    with torch.no_grad():
        for x in text:
            b, w = base.inner(x), wanted.inner(x)
            pairs += [(b, w), (base.inner(torch.tanh(b)), wanted.inner(torch.tanh(w)))]
    best = fit.best_rotation(
        fit.moments(torch.cat([b for b, _ in pairs]).T, torch.cat([w for _, w in pairs]).T, G), "road_2"
    )
    for inputs in ("base", "adapted"):
        got = run(base, wanted, text, inputs).adapter.layers["inner"].rotation
        torch.testing.assert_close(got.direct, best.direct.float(), rtol=0, atol=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    base, wanted, _ = nets()
    with pytest.raises(ConfigError, match="no batches"):
        run(base, wanted, [])
    with pytest.raises(ConfigError, match="inputs='sideways'"):
        run(base, wanted, batches(), "sideways")
    with pytest.raises(ConfigError, match="such as"):
        run(base, wanted, batches(), target_modules=["lm_head"])
    with pytest.raises(ConfigError, match="group_size"):
        fit.from_activations(base, wanted, batches(), group_size=32)
    lacking = copy.deepcopy(wanted)
    del lacking.unused
    with pytest.raises(ConfigError, match="without unused"):
        run(base, lacking, batches())
    with pytest.raises(AdapterError, match="do not differ"):
        run(base, copy.deepcopy(base), batches())
    wider = copy.deepcopy(wanted)
    wider.after = nn.Linear(8, 20, bias=False)
    wider.lm_head = nn.Linear(20, 50)
    with pytest.raises(AdapterError, match="equal shapes"):
        run(base, wider, batches(), "base")


class Read(Net):
    """Computes with the weight of `after`, and does not call it."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        return self.lm_head(torch.tanh(torch.tanh(self.q(x) * self.k(x)) @ self.after.weight.t()))


def test_layers_that_the_model_does_not_call_are_left_out_or_refused(caplog: pytest.LogCaptureFixture) -> None:
    base, wanted = Read().eval(), Read().eval()
    batches = [torch.randint(50, (2, 6))]
    found = fit.from_activations(base, wanted, batches, group_size=G)
    assert "after" not in found.adapter.layers
    assert "after: Read.forward reads its weight" in caplog.text
    with pytest.raises(UnsupportedLayer, match="got target 'after'"):
        fit.from_activations(base, wanted, batches, group_size=G, target_modules=["q", "after"])

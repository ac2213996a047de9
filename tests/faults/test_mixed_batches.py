"""Faults of stock PEFT when the rows of one batch use different adapters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from roadie.testing import randomise, tiny_llama

NAMES = ["first", "second"]
ROWS = ["second", "__base__", "first", "second"]
TARGETS = {"target_modules": ["q_proj", "v_proj", "down_proj"], "group_size": 16}
PROMPTS = torch.arange(4 * 5).reshape(4, 5) * 7 % 128
TOKENS = {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None}


def _llama(**settings: Any) -> Any:
    # Far from uniform predictions: small differences of an adapter then change the text.
    model = tiny_llama(initializer_range=0.3, **settings)
    model.generation_config.eos_token_id = None
    return model


def _call_with(model: Any, name: str, call: Any) -> torch.Tensor:
    """The call with one adapter (or none) for all rows: what a row of a mixed batch is compared with."""
    if name == "__base__":
        with model.disable_adapter():
            return call()
    active = model.active_adapter
    model.set_adapter(name)
    try:
        return call()
    finally:
        model.set_adapter(active)


def _row_by_row(model: Any, call: Any, rows: list[str] = ROWS, copies: int = 1) -> torch.Tensor:
    """The rows of a batch, each from a run of the whole batch through that row's adapter (copies: results a row)."""
    alone = {name: _call_with(model, name, call) for name in set(rows)}
    return torch.cat([alone[name][index * copies : (index + 1) * copies] for index, name in enumerate(rows)])


def _saved(implementation: Any, folder: Any, base: Any) -> None:
    implementation.adapt_many(base, NAMES, **TARGETS).save_pretrained(folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_generation_on_a_half_precision_base(fault: Any, tmp_path: Any, dtype: torch.dtype) -> None:
    def check(implementation: Any) -> None:
        folder = tmp_path / implementation.name
        _saved(implementation, folder, _llama(dtype=dtype))
        model = implementation.load(_llama(dtype=dtype), folder / "first", adapter_name="first").eval()
        model.load_adapter(folder / "second", adapter_name="second")

        wanted = _row_by_row(model, lambda: model.generate(PROMPTS, do_sample=False, **TOKENS))
        got = model.generate(PROMPTS, do_sample=False, adapter_names=ROWS, **TOKENS)
        assert not torch.equal(wanted[2], model.generate(PROMPTS, do_sample=False, **TOKENS)[0])
        assert torch.equal(got, wanted)

    fault(check, on_stock=RuntimeError, match="Index put requires the source and destination dtypes match")


def _check_generation(implementation: Any, copies: int = 1, **settings: Any) -> None:
    model = implementation.adapt_many(_llama(), NAMES, **TARGETS)

    def generate(**arguments: Any) -> torch.Tensor:
        torch.manual_seed(0)
        return model.generate(PROMPTS, **settings, **TOKENS, **arguments)

    wanted = _row_by_row(model, generate, copies=copies)
    assert torch.equal(generate(adapter_names=ROWS), wanted)


def test_beam_search(fault: Any) -> None:
    settings = {"num_beams": 3, "do_sample": False}
    fault(_check_generation, on_stock=ValueError, match="Length of `adapter_names`", **settings)


def test_beam_search_that_returns_several_sequences(fault: Any) -> None:
    settings = {"num_beams": 3, "num_return_sequences": 2, "do_sample": False, "copies": 2}
    fault(_check_generation, on_stock=ValueError, match="Length of `adapter_names`", **settings)


def test_sampling_that_returns_several_sequences(fault: Any) -> None:
    settings = {"num_return_sequences": 2, "do_sample": True, "copies": 2}
    fault(_check_generation, on_stock=ValueError, match="Length of `adapter_names`", **settings)


def test_each_row_uses_its_own_copy_of_a_saved_module(fault: Any) -> None:
    def check(implementation: Any) -> None:
        model = implementation.adapt_many(_llama(), NAMES, modules_to_save=["lm_head"], **TARGETS)
        head = model.base_model.model.lm_head.modules_to_save
        with torch.no_grad():
            head["first"].weight.mul_(2)
            head["second"].weight.mul_(-1)
        wanted = _row_by_row(model, lambda: model(PROMPTS).logits)
        got = model(PROMPTS, adapter_names=ROWS).logits
        assert torch.equal(got[2], wanted[2]), "the active adapter's own row is wrong"
        torch.testing.assert_close(got[0], wanted[0], msg="the row of an adapter that is not active is wrong")
        torch.testing.assert_close(got, wanted)

    with torch.no_grad():
        fault(check, match="the row of an adapter that is not active is wrong")


def test_each_row_uses_its_own_trained_tokens(fault: Any) -> None:
    def check(implementation: Any) -> None:
        model = implementation.adapt_many(_llama(), NAMES, trainable_token_indices=[0, 7, 14], **TARGETS)
        tokens = [p for name, p in sorted(model.named_parameters()) if "trainable_tokens_delta" in name]
        assert len(tokens) == 2
        with torch.no_grad():
            tokens[0].add_(1)
            tokens[1].sub_(2)
            wanted = _row_by_row(model, lambda: model(PROMPTS).logits)
            torch.testing.assert_close(model(PROMPTS, adapter_names=ROWS).logits, wanted)

    fault(check, on_stock=TypeError, match="unexpected keyword argument 'trainable_token_indices'")


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["no checkpointing", "checkpointing", "reentrant"])
def test_a_batch_in_training_mode_trains_each_adapter_on_its_own_rows(fault: Any, checkpointing: bool | None) -> None:
    def check(implementation: Any) -> None:
        model = implementation.adapt_many(_llama(), NAMES, **TARGETS).train()
        road = {name: p.requires_grad_(True) for name, p in model.named_parameters() if ".road_" in name}
        wanted = _gradients_row_by_row(model, road)
        if checkpointing is not None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model(PROMPTS, adapter_names=ROWS).logits.square().sum().backward()
        for name, parameter in road.items():
            largest = wanted[name].abs().max().item()
            assert largest > 0
            # Sums over rows in another order: relative to the largest element, as a row's noise is.
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=0, atol=1e-4 * largest)

    fault(check, on_stock=ValueError, match="Cannot pass `adapter_names` when the model is in training mode")


def _gradients_row_by_row(model: Any, road: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    for adapter in NAMES:
        model.set_adapter(adapter)
        mine = torch.tensor([name == adapter for name in ROWS])
        model(PROMPTS[mine]).logits.square().sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in road.items()}
    model.zero_grad()
    for parameter in road.values():
        parameter.requires_grad_(True)
    return gradients


def test_nothing_is_left_behind_when_a_forward_raises(fault: Any) -> None:
    def check(implementation: Any) -> None:
        model = implementation.adapt_many(_llama(), NAMES, **TARGETS)
        wanted = model(PROMPTS).logits
        with pytest.raises(IndexError):
            model(PROMPTS + 1000, adapter_names=ROWS)
        assert torch.equal(model(PROMPTS).logits, wanted), "a plain call uses the adapters of the call that raised"

    with torch.no_grad():
        fault(check, match="a plain call uses the adapters of the call that raised")


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_no_module_carries_a_trace_of_a_call_that_raised(fault: Any, training: bool) -> None:
    def check(implementation: Any) -> None:
        model = implementation.adapt_many(_llama(), NAMES, modules_to_save=["lm_head"], **TARGETS)
        model.train(training and not implementation.is_stock)  # which refuses the call in training, at the door
        model.gradient_checkpointing_enable()
        before = _marks(model)
        with pytest.raises(IndexError):
            model(PROMPTS + 1000, adapter_names=ROWS)
        left = [name for name, marks in _marks(model).items() if marks != before[name]]
        assert not left, f"marks are left on {left}"

    fault(check, match="marks are left on .*q_proj")


def _marks(model: nn.Module) -> dict[str, Any]:
    """What a call could leave on a module: attributes, hooks, replaced functions."""
    return {
        name: (
            sorted(module.__dict__),
            len(module._forward_pre_hooks) + len(module._forward_hooks),
            id(module.__dict__.get("forward")),
            id(module.__dict__.get("_gradient_checkpointing_func")),
        )
        for name, module in model.named_modules()
    }


def test_nothing_is_left_behind_when_generate_raises(fault: Any) -> None:
    def check(implementation: Any) -> None:
        model = implementation.adapt_many(_llama(), NAMES, **TARGETS)
        wanted = model(PROMPTS).logits
        with pytest.raises(IndexError):
            model.generate(PROMPTS + 1000, adapter_names=ROWS, **TOKENS)
        assert torch.equal(model(PROMPTS).logits, wanted), "a plain call uses the adapters of the call that raised"

    with torch.no_grad():
        fault(check, match="a plain call uses the adapters of the call that raised")


class _Echo(nn.Linear):
    """A layer that gives back its own input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_a_base_layer_may_return_its_own_input(fault: Any) -> None:
    def check(implementation: Any) -> None:
        model = implementation.adapt_many(nn.Sequential(_Echo(32, 32)), NAMES, target_modules=["0"], group_size=8)
        x = torch.randn(3, 32)
        before = x.clone()
        result = model(x, adapter_names=["first", "second", "__base__"])
        assert not torch.equal(result, before)
        assert torch.equal(x, before), "the caller's tensor was overwritten"

    with torch.no_grad():
        fault(check, match="the caller's tensor was overwritten")


def test_rows_may_differ_in_variant_and_group_size_on_half_precision(fault: Any) -> None:
    def check(implementation: Any) -> None:
        model = implementation.adapt(_llama(dtype=torch.bfloat16), "first", **TARGETS)
        model.add_adapter("second", implementation.config(variant="road_4", **{**TARGETS, "group_size": 2}))
        randomise(model).eval()
        with torch.no_grad():
            wanted = _row_by_row(model, lambda: model(PROMPTS).logits)
            got = model(PROMPTS, adapter_names=ROWS).logits
        assert got.dtype == torch.bfloat16
        # The rows see the same numbers in the same order: the rotation is elementwise.
        assert torch.equal(got, wanted)

    fault(check, on_stock=RuntimeError, match="Index put requires the source and destination dtypes match")

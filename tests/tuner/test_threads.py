"""Several threads run one model: each has the rows that it chose, and nothing is left of them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.patience import HANG_S
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import roadie
from roadie.testing import randomise, tiny_llama

IDS = torch.tensor([[1, 5, 9], [2, 6, 10], [3, 7, 11], [4, 8, 12]])
ROWS: dict[str, list[Any]] = {"one": ["a", "b", None, "a"], "other": ["b", None, "a", {"a": 0.5}]}


def _adapted(base: nn.Module, *targets: str) -> Any:
    config = {"target_modules": list(targets), "group_size": 8}
    model = roadie.get_peft_model(base, roadie.RoadConfig(**config), adapter_name="a")
    model.add_adapter("b", roadie.RoadConfig(**config))
    for seed, name in enumerate("ab"):
        randomise(model, seed=seed, adapter=name)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "road_theta" in path:
                parameter.mul_(0.3)
            elif "road_alpha" in path:
                parameter.copy_(1 + 0.3 * (parameter - 1).clamp(-1, 1))
    return model.eval()


def _in_thread(run: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def _logits(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=IDS).logits
    return logits


def test_threads_that_run_one_model_at_a_time_have_rows_of_their_own() -> None:
    """Each is within its block while the other runs, and a third has chosen nothing."""
    model = _adapted(tiny_llama(), "q_proj", "down_proj")
    wanted = {"none": _logits(model)}
    for name, rows in ROWS.items():
        with roadie.rows(model, rows):
            wanted[name] = _logits(model)
    got: dict[str, Tensor] = {}
    inside, done = threading.Barrier(3), threading.Barrier(3)

    def run(name: str) -> None:
        with roadie.rows(model, ROWS[name]):
            inside.wait(HANG_S)
            got[name] = _logits(model)
            done.wait(HANG_S)

    threads = [_in_thread(lambda name=name: run(name)) for name in ROWS]  # type: ignore[misc]
    inside.wait(HANG_S)
    got["none"] = _logits(model)
    done.wait(HANG_S)
    for thread in threads:
        thread.join(HANG_S)
    for name, logits in wanted.items():
        assert torch.equal(got[name], logits), name
    assert torch.equal(_logits(model), wanted["none"])


def test_a_thread_that_is_started_inside_of_a_block_is_told_once_that_it_has_no_rows(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As a thread that generates for a streamer."""
    model = _adapted(tiny_llama(), "q_proj").eval()
    with caplog.at_level(logging.WARNING, logger="roadie"):
        _logits(model)
        with roadie.rows(model, ROWS["one"]):
            _logits(model)
            assert not caplog.records
            for _ in range(2):
                _in_thread(lambda: _logits(model)).join(HANG_S)
        _in_thread(lambda: _logits(model)).join(HANG_S)
    assert ["enter roadie.rows in this thread" in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.slow
@pytest.mark.parametrize("is_compiled", [False, True])
def test_nothing_is_left_of_blocks_that_end_in_the_order_they_began(is_compiled: bool) -> None:
    model = _adapted(tiny_llama(), "q_proj").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    plain, hooks = model(input_ids=IDS).logits.detach(), _hooks(model)
    called = torch.compile(model, backend="eager") if is_compiled else model
    began, ended = threading.Event(), threading.Event()

    def run() -> None:
        with roadie.rows(model, ROWS["other"]):
            began.set()
            assert ended.wait(HANG_S)

    with roadie.rows(model, ROWS["one"]):
        thread = _in_thread(run)
        assert began.wait(HANG_S)
    ended.set()
    thread.join(HANG_S)
    assert _hooks(model) == hooks
    torch.testing.assert_close(called(input_ids=IDS).logits.detach(), plain)


def _hooks(model: nn.Module) -> list[Any]:
    kinds = [(module._forward_hooks, module._forward_pre_hooks) for module in model.modules()]
    checkpoints = [module.__dict__.get("_gradient_checkpointing_func") for module in model.modules()]
    return [*[tuple(map(len, each)) for each in kinds], *checkpoints]


class Checkpointed(nn.Module):
    """A block that is run again in backward, by torch itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.up = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = checkpoint(lambda x: self.up(x).tanh(), self.first(x), use_reentrant=False)
        return result


def test_a_block_that_autograd_runs_again_in_a_thread_of_its_own_has_the_rows_of_the_caller() -> None:
    """As backward does on a GPU."""
    model = _adapted(Checkpointed(), "up")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("road_" in name)
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    road = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with roadie.rows(model, ["a", "b", "__base__", "a"]):
        wanted = torch.autograd.grad(model(x).sin().sum(), road)
        loss = model(x).sin().sum()
        found: list[tuple[Tensor, ...]] = []
        _in_thread(lambda: found.append(torch.autograd.grad(loss, road))).join(HANG_S)
    for got, gradient in zip(*found, wanted, strict=True):
        assert torch.equal(got, gradient)
    assert all(bool(gradient.any()) for gradient in wanted)


@pytest.mark.parametrize("how", ["counted", "through .data"])
def test_what_is_written_between_the_block_and_the_call_is_seen(how: str) -> None:
    model = _adapted(tiny_llama(), "q_proj", "down_proj")
    with torch.no_grad(), roadie.rows(model, ["a", "b", "a", "b"]):
        for layer in (module for module in model.modules() if isinstance(module, roadie.RoadLayer)):
            theta = layer.road_theta["a"]
            (theta if how == "counted" else theta.data).add_(0.3)
        got = _logits(model)
    model.set_adapter("a")
    torch.testing.assert_close(got[0], _logits(model)[0])


def test_a_layer_that_is_called_by_itself_within_the_block_sees_what_is_written() -> None:
    model = _adapted(tiny_llama(), "q_proj")
    layer = next(module for module in model.modules() if isinstance(module, roadie.RoadLayer))
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), roadie.rows(model, ["a", "b"]):
        model(input_ids=IDS[:2])
        before = layer(x)
        layer.road_theta["a"].add_(0.3)
        after = layer(x)
    assert not torch.allclose(after[0], before[0])
    assert torch.equal(after[1], before[1])


def test_what_is_written_after_a_call_that_raised_is_seen() -> None:
    model = _adapted(tiny_llama(), "q_proj", "down_proj")
    with torch.no_grad(), roadie.rows(model, ["a", "b", "a", "b"]):
        with pytest.raises(ValueError, match="Length"):
            model(input_ids=IDS[:3])
        handle = model.get_base_model().lm_head.register_forward_hook(_refuse)
        with pytest.raises(ArithmeticError):
            model(input_ids=IDS)
        handle.remove()
        for layer in (module for module in model.modules() if isinstance(module, roadie.RoadLayer)):
            layer.road_theta["a"].add_(0.3)
        got = _logits(model)
    model.set_adapter("a")
    torch.testing.assert_close(got[0], _logits(model)[0])


def _refuse(*_: Any) -> None:
    raise ArithmeticError

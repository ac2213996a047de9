"""What an adapted layer keeps for backward, and when it writes into the base layer's output."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from tests.versions import needs_a_compiler_of_whole_models, needs_a_compiler_that_recomputes_copies
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import roadie
from roadie.errors import InPlaceError
from roadie.linear import gives_fresh_memory
from roadie.testing import randomise, stock_peft, tiny_llama
from roadie.tuner import KeptForBackward

VARIANTS = ["road_1", "road_2", "road_4"]
WIDTH, OUT, ROWS = 16, 64, 32


def kept_storages(compute: Callable[[], Tensor], *left_out: Tensor) -> dict[int, int]:
    """Bytes by storage of what `compute` keeps for backward, without parameters and the tensors left out."""
    known = {tensor.untyped_storage().data_ptr() for tensor in left_out}
    kept: dict[int, tuple[Tensor, int]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = (tensor, storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = compute()
    assert result.requires_grad
    return {address: size for address, (_, size) in kept.items()}


def adapted(model: nn.Module, **settings: Any) -> Any:
    return randomise(roadie.get_peft_model(model, roadie.RoadConfig(**{"group_size": 16, **settings})))


def large(kept: dict[int, int], rows: int = ROWS) -> list[int]:
    """Bytes of what has a size that grows with the batch; tables of one layer are smaller."""
    return sorted(size for size in kept.values() if size >= rows * OUT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mixed", [False, True], ids=["plain", "mixed"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_one_tensor_in_the_dtype_of_the_output_is_kept(variant: str, mixed: bool, dtype: torch.dtype) -> None:
    rows = 512  # far more than the tables of a layer
    model = adapted(nn.Sequential(nn.Linear(WIDTH, OUT, dtype=dtype)), target_modules=["0"], variant=variant)
    x = torch.randn(rows, WIDTH, dtype=dtype, requires_grad=True)
    arguments = {"adapter_names": ["default", "__base__"] * (rows // 2)} if mixed else {}
    frozen = nn.Linear(WIDTH, OUT, dtype=dtype).requires_grad_(False)
    before = kept_storages(lambda: frozen(x), x, *frozen.parameters())
    kept = kept_storages(lambda: model(x, **arguments), x, *model.parameters())
    assert large(before, rows) == []
    assert large(kept, rows) == [rows * OUT * dtype.itemsize]


def test_the_output_that_the_next_operation_keeps_anyway_is_the_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """gate_proj and up_proj of a Llama: with road_1 the block keeps what it keeps without adapters."""
    sizes = {}
    for name in ("base", "road_1", "road_2"):
        mlp = tiny_llama(num_hidden_layers=1, intermediate_size=OUT).model.layers[0].mlp
        model = mlp.requires_grad_(False)
        if name != "base":
            model = adapted(mlp, target_modules=["gate_proj", "up_proj"], variant=name)
        x = torch.randn(1, 512, 64, requires_grad=True)
        sizes[name] = large(kept_storages(lambda model=model, x=x: model(x), x, *model.parameters()), 512)
    tensor = 512 * OUT * 4
    assert sizes["road_1"] == sizes["base"]
    assert sizes["road_2"] == sorted([*sizes["base"], tensor, tensor])


def test_the_lazy_copy_of_an_output_is_the_memory_that_the_next_operation_keeps() -> None:
    """The same, by the memory itself, of which a lazy copy is not seen as a storage of its own by hooks."""
    mlp = tiny_llama(num_hidden_layers=1, intermediate_size=OUT).model.layers[0].mlp
    model = adapted(mlp, target_modules=["gate_proj", "up_proj"])
    x = torch.randn(1, 512, 64, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        result = model(x)
    copies = [getattr(tensor.untyped_storage(), "roadie_kept", None) for tensor in kept]
    memory = {torch._C._data_address(t) for t in (*kept, *copies) if t is not None and t.shape == (1, 512, OUT)}
    assert sum(copy is not None for copy in copies) >= 2
    assert len(memory) == 3  # gate and up, and SiLU of gate, which the product keeps
    result.sum().backward()


def test_under_autocast_the_kept_tensor_is_of_the_low_dtype() -> None:
    model = adapted(nn.Sequential(nn.Linear(WIDTH, OUT)), target_modules=["0"])
    x = torch.randn(512, WIDTH, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kept = kept_storages(lambda: model(x), x, *model.parameters())
        assert model(x).dtype == torch.bfloat16
    assert large(kept, 512) == [512 * OUT * 2]  # (the input and the weight that autocast made are smaller)


def test_a_frozen_adapter_keeps_nothing() -> None:
    model = adapted(nn.Sequential(nn.Linear(WIDTH, OUT)), target_modules=["0"]).requires_grad_(False)
    x = torch.randn(512, WIDTH, requires_grad=True)
    assert large(kept_storages(lambda: model(x), x, *model.parameters()), 512) == []


class _Changing(nn.Module):
    """A linear layer whose output is changed in place."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, OUT)
        self.activation = nn.ReLU(inplace=True) if way == "ReLU(inplace=True)" else nn.Identity()
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation(self.linear(x))
        if self.way == "y += r":
            y += x.repeat(1, OUT // WIDTH)
        return y if self.way != "F.relu(y, inplace=True)" else F.relu(y, inplace=True)


def gradients(model: Any) -> list[Tensor]:
    x = torch.linspace(-1, 1, 8 * WIDTH).reshape(8, WIDTH)
    (model(x) * torch.linspace(0, 3, OUT)).sum().backward()
    return [p.grad for name, p in sorted(model.named_parameters()) if "road_" in name]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("way", ["ReLU(inplace=True)", "F.relu(y, inplace=True)", "y += r"])
def test_a_model_that_changes_outputs_in_place_trains_as_with_stock_peft(way: str, variant: str) -> None:
    settings = {"target_modules": ["linear"], "group_size": 16, "variant": variant}
    torch.manual_seed(0)
    ours = randomise(roadie.get_peft_model(_Changing(way), roadie.RoadConfig(**settings)))
    torch.manual_seed(0)
    with stock_peft() as config:
        stock = randomise(peft.get_peft_model(_Changing(way), config(**settings)))
    for got, wanted in zip(gradients(ours), gradients(stock), strict=True):
        torch.testing.assert_close(got, wanted)
    ours.base_model.set_kept_for_backward("output")
    with pytest.raises(InPlaceError, match=r"set_kept_for_backward\('input'\)"):
        gradients(ours)


def test_what_is_kept_can_be_chosen_and_wrong_choices_are_refused() -> None:
    model = adapted(nn.Sequential(nn.Linear(WIDTH, OUT)), target_modules=["0"], variant="road_2")
    x = torch.randn(8, WIDTH, requires_grad=True)
    results = []
    for kept in KeptForBackward:
        model.base_model.set_kept_for_backward(kept.value)
        results.append(
            torch.autograd.grad(model(x).sin().sum(), [x, *(p for p in model.parameters() if p.requires_grad)])
        )
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="everything"):
        model.base_model.set_kept_for_backward("everything")


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    model = adapted(nn.Sequential(nn.Linear(WIDTH, OUT)), target_modules=["0"])
    trained = [p for p in model.parameters() if p.requires_grad]
    x = torch.randn(8, WIDTH, requires_grad=True)
    wanted = torch.autograd.grad(model(x).sin().sum(), trained)
    got = torch.autograd.grad(checkpoint(model, x, use_reentrant=False).sin().sum(), trained)
    assert all(map(torch.equal, got, wanted))


@contextmanager
def base_outputs(layer: nn.Module) -> Iterator[list[int]]:
    """Addresses of what the base layer returns, seen without a hook on it."""
    seen: list[int] = []
    linear = F.linear

    def watched(*arguments: Any) -> Tensor:
        y = linear(*arguments)
        seen.append(y.data_ptr())
        return y

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "linear", watched)
        yield seen


@pytest.mark.parametrize("mixed", [False, True], ids=["plain", "mixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_gradients_the_rotation_is_in_place(dtype: torch.dtype, mixed: bool) -> None:
    model = adapted(nn.Sequential(nn.Linear(WIDTH, OUT, dtype=dtype)), target_modules=["0"])
    x = torch.randn(4, WIDTH, dtype=dtype)
    arguments = {"adapter_names": ["default", "__base__"] * 2} if mixed else {}
    with_gradient = model(x, **arguments)
    with torch.no_grad(), base_outputs(model) as addresses:
        y = model(x, **arguments)
        assert y.data_ptr() == addresses[-1]
    with torch.inference_mode(), base_outputs(model) as addresses:
        assert model(x, **arguments).data_ptr() == addresses[-1]
    assert torch.equal(y, with_gradient)


@pytest.mark.parametrize(
    ("variant", "bias", "is_in_place"), [("road_1", False, True), ("road_1", True, False), ("road_2", False, False)]
)
def test_in_training_it_is_in_place_where_the_output_is_kept_and_is_no_view(
    variant: str, bias: bool, is_in_place: bool
) -> None:
    """A linear layer with a bias returns a view of three-dimensional batches, which autograd would copy."""
    layer = nn.Linear(WIDTH, OUT, bias=bias)
    model = adapted(nn.Sequential(layer), target_modules=["0"], variant=variant)
    x = torch.randn(2, 4, WIDTH, requires_grad=True)
    trained = [x, *(p for p in model.parameters() if p.requires_grad)]
    with base_outputs(model) as addresses:
        y = model(x)
    assert (
        torch._C._data_address(y) == addresses[-1]
    ) == is_in_place  # (data_ptr would move it away from its lazy copy)
    got = torch.autograd.grad(y.sin().sum(), trained)
    model.base_model.set_kept_for_backward("input")
    torch.testing.assert_close(got, torch.autograd.grad(model(x).sin().sum(), trained))


def test_a_hook_on_the_base_layer_keeps_what_it_saw() -> None:
    model = adapted(nn.Sequential(nn.Linear(WIDTH, OUT)), target_modules=["0"])
    base = model.base_model.model[0].base_layer
    seen: list[Tensor] = []
    handle = base.register_forward_hook(lambda module, inputs, output: seen.append(output))
    x = torch.randn(4, WIDTH)
    with torch.no_grad():
        model(x)
        handle.remove()
        assert torch.equal(seen[0], base(x))


class _Other(nn.Linear):
    pass


def test_only_layers_that_are_known_to_make_new_memory_are_written_into() -> None:
    hooked, replaced = nn.Linear(4, 4), nn.Linear(4, 4)
    hooked.register_forward_hook(lambda *_: None)
    replaced.forward = replaced.forward
    assert gives_fresh_memory(nn.Linear(4, 4))
    assert not any(map(gives_fresh_memory, (hooked, replaced, _Other(4, 4))))
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert not gives_fresh_memory(nn.Linear(4, 4))
    finally:
        handle.remove()


@needs_a_compiler_of_whole_models
@needs_a_compiler_that_recomputes_copies
def test_under_compile_the_block_is_one_graph_and_keeps_what_eager_keeps() -> None:
    torch._dynamo.reset()
    mlp = tiny_llama(num_hidden_layers=1, intermediate_size=OUT).model.layers[0].mlp
    model = adapted(mlp, target_modules=["gate_proj", "up_proj"])
    x = torch.randn(1, 512, 64, requires_grad=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    trained = [p for p in model.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(model(x).sin().sum(), trained)
    torch.testing.assert_close(torch.autograd.grad(compiled(x).sin().sum(), trained), wanted)
    sizes = [large(kept_storages(lambda run=run: run(x), x, *model.parameters()), 512) for run in (model, compiled)]
    assert sum(sizes[1]) <= sum(sizes[0])
    torch._dynamo.reset()

"""What backward keeps of a rotation stays what it was, or a change is noticed: by every step of autograd, however saved."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from tests.laws.bounds import assert_within
from tests.versions import needs_a_compiler_of_changed_tables
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import roadie
from roadie.bank.families import AdaptedLayer
from roadie.bank.trainable import TrainableBank
from roadie.errors import InPlaceError
from roadie.kernels import Keep, RotationTable, rotate
from roadie.rotation import Variant
from roadie.testing import randomise
from roadie.testing.accuracy import unit_roundoff

WIDTH, ROWS = 12, 6
DOUBLE = torch.float64
Rotate = Callable[[Tensor], Tensor]


class _Way:
    """A way of rotation: what it rotates, by leaves of autograd that it holds."""

    def __init__(self, rotate: Rotate, leaves: list[Tensor]) -> None:
        self.rotate, self.leaves = rotate, leaves


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def tables(count: int = 1) -> list[RotationTable]:
    return [
        RotationTable(
            (1 + 0.2 * values(1, WIDTH, seed=2 * index)).requires_grad_(),
            (0.4 * values(1, WIDTH, seed=2 * index + 1)).requires_grad_(),
            4,
        )
        for index in range(count)
    ]


class _Looking(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def by_door(keep: Keep) -> _Way:
    (table,) = tables()
    return _Way(lambda x: rotate(x, table, None, keep=keep), [table.direct, table.cross])


def by_operation(keep: Keep) -> _Way:
    """As under a mode of torch, which does not take the shorter way past its dispatcher."""
    (table,) = tables()

    def rotated(x: Tensor) -> Tensor:
        with _Looking():
            return rotate(x, table, None, keep=keep)

    return _Way(rotated, [table.direct, table.cross])


def by_chain(keep: Keep) -> _Way:
    chain = tuple(tables(2))
    leaves = [vector for table in chain for vector in (table.direct, table.cross)]
    return _Way(lambda x: rotate(x, chain, None, keep=keep), leaves)


def by_layer(keep: Keep) -> _Way:
    """A trained layer of a PEFT model, in place of what the base layer returns where the output is kept."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False, dtype=DOUBLE))
    model = randomise(roadie.get_peft_model(base, roadie.RoadConfig(group_size=4, target_modules=["0"])), scale=0.3)
    model.base_model.set_kept_for_backward("auto" if keep is Keep.COPY else keep.value)
    return _Way(model, [parameter for parameter in model.parameters() if parameter.requires_grad])


def by_layer_of_rows(keep: Keep) -> _Way:
    way = by_layer(keep)
    model = way.rotate
    return _Way(lambda x: model(x, adapter_names=["default", "__base__"] * (ROWS // 2)), way.leaves)  # type: ignore[call-arg]


def by_bank(keep: Keep) -> _Way:
    """The training of many adapters."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False, dtype=DOUBLE)).requires_grad_(False)
    bank = TrainableBank(torch.device("cpu"), None if keep is Keep.COPY else keep)
    bank.join({"a": [AdaptedLayer("0", WIDTH, Variant.ROAD_1, (4,))]})
    for stack in bank.families[0].stacks:
        stack.parameters.copy_(0.3 * values(*stack.parameters.shape) + torch.tensor([0.0, 1.0]).view(1, 2, 1, 1))
    bank.make_tables()
    table = bank._tables["0"].chain[0]
    slots = torch.tensor([0, -1] * (ROWS // 2))

    def rotate(x: Tensor) -> Tensor:
        with bank.attached(model, ["0"]), bank.routed(slots):
            return model(x)

    return _Way(rotate, [table.direct, table.cross])


WAYS = {
    "door": by_door,
    "operation": by_operation,
    "layer": by_layer,
    "rows of a layer": by_layer_of_rows,
    "bank": by_bank,
}


def recomputed(function: Rotate, x: Tensor) -> Tensor:
    return checkpoint(function, x, use_reentrant=False)


def recomputed_twice(function: Rotate, x: Tensor) -> Tensor:
    return recomputed(lambda outer: recomputed(function, outer) * 1.0, x)


def recomputed_in_part(function: Rotate, x: Tensor) -> Tensor:
    def policy(_: Any, operation: Any, *__: Any, **___: Any) -> CheckpointPolicy:
        kept = operation is torch.ops.aten.mm.default
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return checkpoint(function, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy))


def recomputed_but_rotations(function: Rotate, x: Tensor) -> Tensor:
    """Selective checkpointing that holds what the rotation returned."""

    def policy(_: Any, operation: Any, *__: Any, **___: Any) -> CheckpointPolicy:
        kept = operation is torch.ops.roadie.rotate_rows.default
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return checkpoint(function, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy))


def on_the_cpu(function: Rotate, x: Tensor) -> Tensor:
    with save_on_cpu():
        return function(x)


def as_it_is(function: Rotate, x: Tensor) -> Tensor:
    with saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        return function(x)


SAVED: dict[str, Callable[[Rotate, Tensor], Tensor]] = {
    "by torch": lambda function, x: function(x),
    "recomputed": recomputed,
    "recomputed twice": recomputed_twice,
    "recomputed in part": recomputed_in_part,
    "recomputed but rotations": recomputed_but_rotations,
    "on the CPU": on_the_cpu,
    "by hooks": as_it_is,
}


def gradients(way: _Way, after: Rotate, saved: str = "by torch") -> list[Tensor]:
    """Of x and of the leaves, for a loss of ``after(R x)``, which may change R x in place."""
    x = (values(ROWS, WIDTH, seed=9)).requires_grad_()
    result = SAVED[saved](lambda x: after(way.rotate(x)), x)
    return list(torch.autograd.grad((result * values(ROWS, WIDTH, seed=8)).sum(), [x, *way.leaves]))


def shifted(z: Tensor) -> Tensor:
    z += 3.0
    return z.sin()


def view_shifted(z: Tensor) -> Tensor:
    z.view(-1)[1::2].mul_(4.0)
    return z.sin()


def rectified(z: Tensor) -> Tensor:
    return z.relu_().sin()


def assert_close(got: list[Tensor], wanted: list[Tensor]) -> None:
    """Sums of ROWS terms of size 1, each of a few dozen roundings, through the solve of a block of condition 2 at most."""
    assert len(got) == len(wanted) > 1
    for gradient, right in zip(got, wanted, strict=True):
        bound = 2 * (ROWS + 64) * unit_roundoff(DOUBLE) * max(1.0, float(right.abs().max()))
        assert_within(gradient, right, torch.full_like(right, bound), "gradient")


@pytest.mark.parametrize("after", [shifted, view_shifted, rectified])
@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("way", WAYS)
def test_a_change_of_the_output_does_not_reach_a_copy(way: str, saved: str, after: Rotate) -> None:
    wanted = gradients(WAYS[way](Keep.INPUT), after)
    assert_close(gradients(WAYS[way](Keep.COPY), after, saved), wanted)


@pytest.mark.parametrize("saved", [name for name in SAVED if name != "recomputed but rotations"])
@pytest.mark.parametrize("way", WAYS)
def test_a_change_of_a_kept_output_is_noticed(way: str, saved: str) -> None:
    with pytest.raises(InPlaceError, match="set_kept_for_backward"):
        gradients(WAYS[way](Keep.OUTPUT), shifted, saved)


@pytest.mark.parametrize("way", ["door", "layer", "rows of a layer", "bank"])
def test_writes_that_autograd_does_not_count_do_not_reach_a_copy(way: str) -> None:
    """As kernels do that are not torch's: rotary embeddings in place, activations whose backward writes into what they got."""
    wanted = gradients(WAYS[way](Keep.INPUT), torch.sin)
    x = values(ROWS, WIDTH, seed=9).requires_grad_()
    used = WAYS[way](Keep.COPY)
    z = used.rotate(x)
    probe = values(ROWS, WIDTH, seed=8) * z.detach().cos()
    z.detach().numpy()[:] += 3.0
    assert_close(list(torch.autograd.grad((z * probe).sum(), [x, *used.leaves])), wanted)


@pytest.mark.parametrize("saved", ["recomputed", "recomputed twice", "on the CPU", "by hooks"])
@pytest.mark.parametrize("way", ["door", "operation", "chain"])
def test_a_change_of_a_kept_input_is_noticed(way: str, saved: str) -> None:
    used = {**WAYS, "chain": by_chain}[way](Keep.INPUT)

    def around(x: Tensor) -> Tensor:
        h = x * 1.0
        z = used.rotate(h)
        h += 3.0
        return z * h.sin()

    x = values(ROWS, WIDTH, seed=9).requires_grad_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation") as raised:
        SAVED[saved](around, x).sum().backward()
    assert not isinstance(raised.value, InPlaceError)


@contextmanager
def copied(changes: int) -> Iterator[None]:
    """What is saved is copied, into tensors that were written to so often already."""

    def pack(tensor: Tensor) -> Tensor:
        there = tensor.detach().clone()
        for _ in range(changes):
            there.mul_(1)
        return there

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield


@pytest.mark.parametrize("changes", [0, 3])
@pytest.mark.parametrize("keep", Keep)
@pytest.mark.parametrize("way", WAYS)
def test_what_hooks_have_copied_is_taken_as_it_is(way: str, keep: Keep, changes: int) -> None:
    wanted = gradients(WAYS[way](Keep.INPUT), shifted)
    used = WAYS[way](keep)
    x = values(ROWS, WIDTH, seed=9).requires_grad_()
    with copied(changes):
        result = shifted(used.rotate(x))
    loss = (result * values(ROWS, WIDTH, seed=8)).sum()
    assert_close(list(torch.autograd.grad(loss, [x, *used.leaves])), wanted)


@pytest.mark.parametrize("after", [torch.sin, shifted, lambda z: shifted(z).pow(2)])
@pytest.mark.parametrize("way", ["door", "layer"])
def test_second_derivatives_with_changes_in_place(way: str, after: Rotate) -> None:
    """(z + 3 in new memory is what z += 3 computes.)"""

    def derivatives(keep: Keep) -> list[Tensor]:
        used = WAYS[way](keep)
        x = values(ROWS, WIDTH, seed=9).requires_grad_()
        loss = (after(used.rotate(x)) * values(ROWS, WIDTH, seed=8)).sum()
        first = torch.autograd.grad(loss, [x, *used.leaves], create_graph=True)
        return list(torch.autograd.grad(sum((gradient**2).sum() for gradient in first), [x, *used.leaves]))

    assert_close(derivatives(Keep.COPY), derivatives(Keep.INPUT))


@pytest.mark.parametrize("way", ["door", "layer", "rows of a layer"])
def test_a_change_between_two_backward_passes_does_not_reach_a_copy(way: str) -> None:
    used = WAYS[way](Keep.COPY)
    x = values(ROWS, WIDTH, seed=9).requires_grad_()
    z = used.rotate(x)
    loss = (z * values(ROWS, WIDTH, seed=8)).sum()
    first = torch.autograd.grad(loss, [x, *used.leaves], retain_graph=True)
    with torch.no_grad():
        z += 3.0
    second = torch.autograd.grad(loss, [x, *used.leaves])
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_is_the_same_memory_until_somebody_writes(way: str) -> None:
    """Through forward and backward of an operation that keeps what it is given, as SiLU does."""
    used, seen = WAYS[way](Keep.COPY), []
    x = values(ROWS, WIDTH, seed=9).requires_grad_()

    def pack(tensor: Tensor) -> Tensor:
        copy = getattr(tensor.untyped_storage(), "roadie_kept", None)
        if tensor.shape == x.shape:
            seen.append(torch._C._data_address(tensor))
            seen.extend([] if copy is None else [torch._C._data_address(copy)])
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        z = used.rotate(x)
        result = z.sin()
    assert len(seen) >= 2
    assert set(seen) == {torch._C._data_address(z)}
    result.sum().backward()
    assert set(seen) == {torch._C._data_address(z)}


def test_under_a_compiler_nothing_is_changed_in_place() -> None:
    (table,) = tables()
    used = _Way(torch.compile(lambda x: shifted(rotate(x, table, None, keep="copy")), backend="aot_eager"), [])
    used.leaves = [table.direct, table.cross]
    wanted = gradients(by_door(Keep.INPUT), shifted)
    for saved in ("by torch", "recomputed", "on the CPU"):
        assert_close(gradients(used, lambda z: z, saved), wanted)
    torch._dynamo.reset()


@needs_a_compiler_of_changed_tables
@pytest.mark.parametrize("keep", Keep)
def test_under_a_compiler_tables_that_are_changed_in_place_are_what_they_were(keep: Keep) -> None:
    (table,) = tables()

    def rotated(x: Tensor, *, in_place: bool) -> Tensor:
        direct = table.direct * 1.0
        z = rotate(x, RotationTable(direct, table.cross, 4), None, keep=keep)
        return z * (direct.mul_(2.0) if in_place else direct * 2.0)

    compiled = torch.compile(rotated, backend="aot_eager")
    leaves = [table.direct, table.cross]
    wanted = gradients(_Way(lambda x: rotated(x, in_place=False), leaves), torch.sin)
    assert_close(gradients(_Way(lambda x: compiled(x, in_place=True), leaves), torch.sin), wanted)
    torch._dynamo.reset()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("hooks", [nullcontext, save_on_cpu])
def test_on_a_gpu_a_change_does_not_reach_a_copy(hooks: Callable[[], AbstractContextManager[Any]]) -> None:
    (table,) = tables()
    results = []
    for keep in (Keep.INPUT, Keep.COPY):
        leaves = [table.direct.detach().cuda().requires_grad_(), table.cross.detach().cuda().requires_grad_()]
        x = values(ROWS, WIDTH, seed=9).cuda().requires_grad_()
        with hooks():
            result = shifted(rotate(x, RotationTable(*leaves, 4), None, keep=keep))
        loss = (result * values(ROWS, WIDTH, seed=8).cuda()).sum()
        results.append([gradient.cpu() for gradient in torch.autograd.grad(loss, [x, *leaves])])
    assert_close(results[1], results[0])

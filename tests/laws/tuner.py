"""The laws of adapted models, as functions that raise AssertionError where one is broken.

Each takes a PeftModel of roadie. Those about merging look at every RoAd layer by itself, with an input of its own, so that
bounds can be derived as in `tests.laws.rotations`: with u the unit roundoff of the weight's dtype, w that of the arithmetic
(float32 or wider) and ``reach = |R| (|W| |R_in| |x| + |b|)``, the base layer is off by at most ``(in + 1) w`` and each rotation
by 7 w (cos, sin and their product 3, product and sum 2, composing 2), relative to the reach; each rounding to the dtype adds u.

Legend: B rows of a batch, D out features of a layer, K rotations applied in order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tests.laws.bounds import assert_within, wide
from tests.laws.reference import dense_rotation
from tests.laws.rotations import ROOM, apply_dense
from torch import Tensor, nn

from roadie import checkpoint
from roadie.bank.blends import BASE
from roadie.rotation import split_stages
from roadie.testing.accuracy import assert_same_bits, relative_error, smallest_step, unit_roundoff
from roadie.tuner import Linear, RoadLayer
from roadie.tuner.merging import ExactUnmerge
from roadie.tuner.weight import is_conv1d

# float64 results that differ only in the order of sums: 1e-16, times the length of the sums and what the rotations amplify.
# Rows that are mixed up differ by about 1.
ORDER_OF_SUMS = 1e-10
FLOAT32_UNMERGE = (
    1e-6  # times the condition number of R, relative to the largest weight of a pair: what roadie promises
)


def layers_of(model: nn.Module) -> dict[str, Linear]:
    """The RoAd layers of a model by their paths; at least one."""
    layers = {path: module for path, module in model.named_modules() if isinstance(module, Linear)}
    assert layers, "got a model without RoAd layers"
    return layers


def sites_of(model: nn.Module) -> dict[str, RoadLayer]:
    """What is rotated in a model, by path: the outputs of the RoAd layers, and the inputs of those that rotate theirs."""
    return {path: module for path, module in model.named_modules() if isinstance(module, RoadLayer)}


def road_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """theta and alpha of all layers and adapters, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if ".road_" in name}


@dataclass(frozen=True)
class LayerTruth:
    """What a layer is at one moment, in float64: weight ``[D, in]``, bias ``[D]`` (zeros where none), K matrices ``[D, D]``.

    inputs: as many matrices ``[in, in]`` as there are rotations of the input, that of the last adapter first.
    """

    weight: Tensor
    bias: Tensor
    matrices: tuple[Tensor, ...]
    inputs: tuple[Tensor, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, layer: Linear, names: Sequence[str]) -> LayerTruth:
        """Of the base layer as it is now, and of the given adapters; those the layer lacks are left out."""
        weight, bias = _weight_and_bias(layer)
        names = [name for name in names if name in layer.road_theta]
        matrices = [matrix for name in names for matrix in _matrices(layer, name)]
        road_input = layer.road_input
        there = [] if road_input is None else [name for name in reversed(names) if name in road_input.road_theta]
        inputs = [matrix for name in there for matrix in _matrices(road_input, name)]
        bias64 = weight.new_zeros(len(weight), dtype=torch.float64) if bias is None else bias.double()
        return cls(weight.double().clone(), bias64.clone(), tuple(matrices), tuple(inputs), weight.dtype)

    @property
    def of_bias(self) -> LayerTruth:
        """What a bias sees of it: the rotations of the output."""
        return replace(self, inputs=())

    @property
    def arithmetic(self) -> float:
        """w K 7, K rotations: what computing the rotations and applying them can cost, relative to the reach."""
        return 7 * (len(self.matrices) + len(self.inputs)) * unit_roundoff(wide(self.dtype))

    def check_output(self, got: Tensor, x: Tensor, what: str) -> None:
        """`got` is ``R_K ... R_1 (W (R_in x) + b)`` up to a rounding after each of the three, and the arithmetic in between."""
        assert got.dtype == self.dtype, f"{what}: got dtype {got.dtype}; wanted {self.dtype}"
        turned, reach = apply_dense(x, self.inputs), apply_dense(x.abs(), [matrix.abs() for matrix in self.inputs])
        truth = apply_dense(nn.functional.linear(turned, self.weight, self.bias), self.matrices)
        size = nn.functional.linear(reach, self.weight.abs(), self.bias.abs())
        sums = (self.weight.shape[1] + 1) * unit_roundoff(wide(self.dtype))
        roundings = 3 if self.inputs else 2
        rounded = roundings * unit_roundoff(self.dtype) if self.dtype != wide(self.dtype) else 0.0
        bound = (sums + self.arithmetic + rounded) * self._through_sizes(size)
        # Below the smallest normal number rounding is absolute; what the first ones leave is amplified by |R| and |W|.
        smallest = torch.full_like(size, smallest_step(self.dtype))
        before = smallest * (1 + self.weight.abs().sum(1)) if self.inputs else smallest
        assert_within(got, truth, (bound + self._through_sizes(before) + smallest) * ROOM, what)

    def check_merged(self, layer: Linear, what: str) -> None:
        """The layer's weight and bias are ``R W R_in`` and ``R b``, rounded once."""
        weight, bias = _weight_and_bias(layer)
        self._check_rounded_once(weight.mT, self.weight.mT, f"{what}: weight")
        if bias is not None:
            self.of_bias._check_rounded_once(bias, self.bias, f"{what}: bias")

    def _check_rounded_once(self, got: Tensor, before: Tensor, what: str) -> None:
        assert got.dtype == self.dtype, f"{what}: got dtype {got.dtype}; wanted {self.dtype}"
        truth = apply_dense(_beside(before, self.inputs), self.matrices)
        inside = self.arithmetic * self._through_sizes(_beside(before.abs(), [matrix.abs() for matrix in self.inputs]))
        last = unit_roundoff(self.dtype) * truth.abs() if self.dtype != wide(self.dtype) else 0.0
        assert_within(got, truth, (inside + last) * ROOM + smallest_step(self.dtype), what)

    def _through_sizes(self, size: Tensor) -> Tensor:
        return apply_dense(size, [matrix.abs() for matrix in self.matrices])

    @property
    def condition(self) -> float:
        """The product of the condition numbers of all rotations."""
        return float(torch.stack([torch.linalg.cond(matrix) for matrix in (*self.matrices, *self.inputs)]).prod())


def _beside(weight: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """``W R_in``, transposed as W is here: ``[in, D]``, in float64; as it is where there are no rotations of the input."""
    for matrix in reversed(inputs):
        weight = matrix.mT @ weight.double()
    return weight


def _matrices(layer: Any, name: str) -> list[Tensor]:
    """Of one adapter: a matrix for each stage of its chain, the first applied first."""
    stages = layer.stages[name]
    theta, alpha = (split_stages(store[name].detach(), len(stages)) for store in (layer.road_theta, layer.road_alpha))
    parts = zip(theta, alpha, stages, strict=True)
    return [dense_rotation(one, other, layer.variant[name], g) for one, other, g in parts]


def _weight_and_bias(layer: RoadLayer) -> tuple[Tensor, Tensor | None]:
    """Weight ``[D, in]`` and bias ``[D]`` as they are stored (views)."""
    base = layer.get_base_layer()
    weight = base.weight.detach()
    return weight.mT if is_conv1d(base) else weight, None if base.bias is None else base.bias.detach()


def _input_of(layer: RoadLayer) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, layer.in_features, generator=generator)
    return x.to(layer.get_base_layer().weight.dtype)


def _check_outputs(layers: dict[str, Linear], truths: dict[str, LayerTruth], what: str) -> None:
    for path, layer in layers.items():
        x = _input_of(layer)
        with torch.no_grad():
            truths[path].check_output(layer(x), x, f"{what}, {path}")


def check_active_adapters_apply_in_order(model: Any, names: Sequence[str]) -> None:
    """With several active adapters the output is rotated by each, in the order given; and in no other order."""
    layers = layers_of(model)
    model.base_model.set_adapter(list(names))
    _check_outputs(layers, {path: LayerTruth.of(layer, names) for path, layer in layers.items()}, "in order")


def check_merged_is_unmerged(model: Any, names: Sequence[str]) -> None:
    """Merging adapters leaves every layer's output as it was, rounds weight and bias once, and is taken back after."""
    layers = layers_of(model)
    truths = {path: LayerTruth.of(layer, names) for path, layer in layers.items()}
    model.base_model.set_adapter(list(names))
    _check_outputs(layers, truths, "unmerged")
    model.merge_adapter(list(names))
    _check_outputs(layers, truths, "merged")
    for path, layer in layers.items():
        assert layer.merged_adapters == [name for name in names if name in layer.road_theta]
        truths[path].check_merged(layer, path)
    model.unmerge_adapter()
    _check_outputs(layers, truths, "unmerged again")


def check_unmerging_restores(model: Any, names: Sequence[str], exact: ExactUnmerge | str) -> None:
    """Unmerging gives weight and bias back as `exact` promises, and nothing is kept afterwards.

    Bit for bit where the promise says so, keeping at most a byte an element (or a plain copy); otherwise within what the
    inverse can do: `FLOAT32_UNMERGE` for float32, and one rounding of the merged weight in half precision.
    """
    layers = layers_of(model)
    truths = {path: LayerTruth.of(layer, names) for path, layer in layers.items()}
    before = {path: [t.clone() for t in _tensors(layer)] for path, layer in layers.items()}
    model.base_model.set_exact_unmerge(exact)
    model.merge_adapter(list(names))
    for path, layer in layers.items():
        _check_kept_bytes(layer, ExactUnmerge(exact), path)
        assert not torch.equal(_tensors(layer)[0], before[path][0]), f"{path}: merging changed nothing"
    model.unmerge_adapter()
    for path, layer in layers.items():
        assert (layer.merged_adapters, layer.unmerge_bytes) == ([], 0), f"{path}: something was left behind"
        for name, got, wanted in zip(("weight", "bias"), _tensors(layer), before[path], strict=False):
            if _is_exact(ExactUnmerge(exact), got.dtype):
                assert_same_bits(got, wanted, f"{path}: {name}")
            else:
                truth = truths[path] if name == "weight" else truths[path].of_bias
                _check_nearly_restored(truth, got, wanted, f"{path}: {name}")


def _tensors(layer: RoadLayer) -> list[Tensor]:
    """Weight ``[in, D]`` and bias ``[D]``, if there is one, with the outputs last."""
    weight, bias = _weight_and_bias(layer)
    return [weight.mT] if bias is None else [weight.mT, bias]


def _is_exact(exact: ExactUnmerge, dtype: torch.dtype) -> bool:
    return exact is ExactUnmerge.ALWAYS or (exact is ExactUnmerge.HALF and dtype.itemsize == 2)


def _check_kept_bytes(layer: Linear, exact: ExactUnmerge, path: str) -> None:
    tensors = _tensors(layer)
    elements = sum(t.numel() for t in tensors)
    if not _is_exact(exact, tensors[0].dtype):
        assert layer.unmerge_bytes == 0, f"{path}: got {layer.unmerge_bytes} bytes kept; wanted none"
        return
    copies = (
        elements * tensors[0].element_size()
    )  # where a byte an element does not suffice: badly conditioned, or tiny
    assert 0 < layer.unmerge_bytes <= copies, f"{path}: got {layer.unmerge_bytes} bytes kept for {elements} elements"


def _check_nearly_restored(truth: LayerTruth, got: Tensor, wanted: Tensor, what: str) -> None:
    assert got.dtype == wanted.dtype, f"{what}: got dtype {got.dtype}; wanted {wanted.dtype}"
    inverses, of_inputs = (
        [torch.linalg.inv(matrix) for matrix in reversed(matrices)] for matrices in (truth.matrices, truth.inputs)
    )
    merged = apply_dense(_beside(wanted, truth.inputs), truth.matrices).abs()
    through = _back(merged, inverses, of_inputs)
    if wanted.dtype == wide(wanted.dtype):
        largest = wanted.double().abs().amax(dim=-1, keepdim=True)
        if truth.inputs:  # a pair of inputs is two rows here
            largest = largest.amax()
        factor = FLOAT32_UNMERGE if wanted.dtype == torch.float32 else unit_roundoff(torch.float64) * 32
        bound = factor * truth.condition * largest.expand_as(through)
    else:
        sizes = truth._through_sizes(_beside(wanted.abs(), [matrix.abs() for matrix in truth.inputs]))
        all_through = _back(sizes, inverses, of_inputs)
        step = _back(torch.full_like(merged, smallest_step(wanted.dtype)), inverses, of_inputs)
        bound = unit_roundoff(wanted.dtype) * (through + wanted.double().abs()) + 4 * truth.arithmetic * all_through
        bound = bound + step + smallest_step(wanted.dtype)
    assert_within(got, wanted, bound * ROOM, what)


def _back(sizes: Tensor, inverses: Sequence[Tensor], of_inputs: Sequence[Tensor]) -> Tensor:
    """How large errors of these sizes in a merged weight may become on the way back."""
    return apply_dense(_beside(sizes, [matrix.abs() for matrix in of_inputs]), [matrix.abs() for matrix in inverses])


def check_mixed_rows_are_rows_alone(model: Any, x: Tensor, names: Sequence[str]) -> None:
    """Row b of a mixed batch is row b of the whole batch through its own adapter, bit for bit ("__base__": through none).

    In float64 it is also that row run all alone, up to the order of sums.
    """
    model.eval()
    with torch.no_grad():
        mixed = model(x, adapter_names=list(names))
        whole = {name: _through(model, name, lambda: model(x)) for name in set(names)}
        for row, name in enumerate(names):
            assert_same_bits(mixed[row], whole[name][row], f"row {row} ({name})")
            if x.dtype == torch.float64:
                alone = _through(model, name, lambda row=row: model(x[row : row + 1]))[0]  # type: ignore[misc]
                error = relative_error(mixed[row], alone)
                assert error <= ORDER_OF_SUMS, f"row {row} ({name}): got an error of {error:.3g} against the row alone"
        again = model(x)
    assert torch.equal(again, _through(model, model.active_adapter, lambda: model(x).detach())), (
        "the rows' choice stayed"
    )


def _through(model: Any, name: str, call: Callable[[], Tensor]) -> Tensor:
    """The call with one adapter active, or with none for "__base__"; the active adapter is put back."""
    if name == BASE:
        with model.disable_adapter():
            return call()
    active = model.active_adapter
    model.set_adapter(name)
    try:
        return call()
    finally:
        model.set_adapter(active)


def check_mixed_gradients_are_those_of_rows_alone(model: Any, x: Tensor, names: Sequence[str]) -> None:
    """In training, each row's gradient goes to its own adapter (and to its input), as if it were run alone; x in float64."""
    assert x.dtype == torch.float64
    model.train()
    parameters = road_parameters(model)
    generator = torch.Generator().manual_seed(1)
    probe = torch.randn(model.eval()(x).shape, generator=generator, dtype=x.dtype)

    def gradients(rows: slice, **arguments: Any) -> dict[str, Tensor]:
        part = x[rows].clone().requires_grad_()
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        outputs = (model(part, **arguments) * probe[rows]).sum()
        found = torch.autograd.grad(outputs, [part, *parameters.values()], allow_unused=True, materialize_grads=True)
        return dict(zip(("input", *parameters), found, strict=True))

    model.train()
    mixed = gradients(slice(None), adapter_names=list(names))
    alone = [
        _through(model, name, lambda row=row: gradients(slice(row, row + 1)))  # type: ignore[misc, arg-type]
        for row, name in enumerate(names)
    ]
    for key, got in mixed.items():
        parts = [found[key] for found in alone]  # type: ignore[index]
        wanted = torch.cat(parts) if key == "input" else torch.stack(parts).sum(dim=0)
        error = relative_error(got, wanted)
        assert error <= ORDER_OF_SUMS, f"gradient of {key}: got an error of {error:.3g} against the rows alone"


def check_saving_and_loading_keeps_every_bit(
    model: Any, load: Callable[[Path], Any], folder: Path, adapter: str = "default"
) -> None:
    """What is saved is loaded bit for bit, by PEFT's routes and by `roadie.checkpoint`; saved again it is the same bytes.

    load: makes a model from the folder (`PeftModel.from_pretrained` on a fresh base model).
    """
    model.save_pretrained(folder / "once")
    again = load(folder / "once")
    saved, loaded = road_parameters(model), road_parameters(again)
    assert set(saved) == set(loaded), f"got parameters {sorted(loaded)}; wanted {sorted(saved)}"
    for name, parameter in saved.items():
        assert_same_bits(loaded[name], parameter, name)
    for path, layer in sites_of(model).items():
        twin = sites_of(again)[path]
        assert (twin.variant, twin.group_size) == (layer.variant, layer.group_size), f"{path}: another variant or size"
    again.save_pretrained(folder / "twice")
    checkpoint.save(checkpoint.load(folder / "once"), folder / "third")
    for name in (checkpoint.WEIGHTS_NAME, checkpoint.CONFIG_NAME):
        once = (folder / "once" / name).read_bytes()
        assert (folder / "twice" / name).read_bytes() == once, f"{name}: other bytes when saved again"
        assert (folder / "third" / name).read_bytes() == once, f"{name}: other bytes when saved by roadie.checkpoint"
    _check_adapter_value(model, checkpoint.load(folder / "once"), adapter)


def _check_adapter_value(model: Any, value: Any, adapter: str) -> None:
    layers = {path.removeprefix("base_model.model."): layer for path, layer in sites_of(model).items()}
    assert set(value.layers) == set(layers)
    for path, stored in value.layers.items():
        layer = layers[path]
        assert_same_bits(stored.theta, layer.road_theta[adapter], f"{path}: theta")
        assert_same_bits(stored.alpha, layer.road_alpha[adapter], f"{path}: alpha")
        assert (stored.variant.value, stored.stages) == (layer.variant[adapter], layer.stages[adapter])

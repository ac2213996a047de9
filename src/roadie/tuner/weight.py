"""The base layer's weight, whatever it is stored as: how to merge a rotation into it, and how to go back.

Weights are rotated in place (`DenseWeight`, and `StackedWeight` of the experts of a mixture), but for quantised ones, which are
read, rotated and stored again by PEFT's quantisation backend (`QuantisedWeight`), whose original is kept as it was, at most a
byte an element.
"""

from __future__ import annotations

import copy
import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from roadie.errors import MergeError
from roadie.experts import Projection
from roadie.tuner.merging import (
    ExactUnmerge,
    UndoRecord,
    WeightRotations,
    check_finite,
    inverses,
    restore_in_place,
    rotate_in_place,
    rotated_rows,
)
from roadie.tuner.snapshot import undone_if_raised

logger = logging.getLogger("roadie")


@dataclass(frozen=True)
class Merge:
    """One merge of a layer: which adapters, and what it takes to take it back from the weight and from the bias."""

    adapters: tuple[str, ...]
    weight: UndoRecord | QuantisedOriginal | None
    bias: UndoRecord | None
    tied: nn.Parameter | None = None

    @property
    def can_be_undone(self) -> bool:
        """False where a block was singular."""
        return self.weight is not None

    @property
    def nbytes(self) -> int:
        """Bytes kept for an exact return."""
        return sum(record.nbytes for record in (self.weight, self.bias) if record is not None)


class BaseWeight(ABC):
    """The weight and bias of a base layer, as something a rotation can be merged into."""

    def __init__(self, base_layer: nn.Module) -> None:
        self.base_layer: Any = base_layer
        self._dim: int | None = 1 if is_conv1d(base_layer) else 0  # where the outputs are
        self._dim_of_bias: int | None = 0

    @property
    def bias(self) -> Tensor | None:
        """The bias ``[D]``, if the layer has one."""
        bias = getattr(self.base_layer, "bias", None)
        return bias if isinstance(bias, Tensor) else None

    def check_can_merge(self) -> None:
        """Raise `MergeError` if nothing can be merged into this kind of weight."""
        self._dense()

    def check(self, rotations: WeightRotations, adapters: str) -> None:
        """Raise `MergeError` if merging gives a non-finite value; changes nothing."""
        check_finite(self._dense(), rotations, self._dim, adapters, "weights")
        if self.bias is not None:
            check_finite(self.bias, rotations.of_bias, self._dim_of_bias, adapters, "bias")

    @abstractmethod
    def _dense(self) -> Tensor:
        """The weight as numbers; raises as `check_can_merge` does."""

    def merge(self, rotations: WeightRotations, exact: ExactUnmerge) -> tuple[Any, UndoRecord | None, Any]:
        """Merge into weight and bias, both or neither; returns the last three fields of `Merge`."""
        dense = self._dense()
        bias = self._merge_bias(rotations, exact)
        with undone_if_raised(lambda: self._unmerge_bias(bias)):
            record, tied = self._merge_weight(dense, rotations, exact)
        return record, bias, tied

    @abstractmethod
    def _merge_weight(self, dense: Tensor, rotations: WeightRotations, exact: ExactUnmerge) -> tuple[Any, Any]: ...

    @abstractmethod
    def unmerge(self, merge: Merge) -> None:
        """Take `merge` back from weight and bias."""

    def _merge_bias(self, rotations: WeightRotations, exact: ExactUnmerge) -> UndoRecord | None:
        return None if self.bias is None else rotate_in_place(self.bias, rotations.of_bias, self._dim_of_bias, exact)

    def _unmerge_bias(self, record: UndoRecord | None) -> None:
        if self.bias is not None and record is not None:
            restore_in_place(self.bias, record, self._dim_of_bias)


class DenseWeight(BaseWeight):
    """A floating-point weight ``[D, in]`` (nn.Linear) or ``[in, D]`` (Conv1D), rotated in place."""

    def _stored(self) -> Tensor:
        weight: Tensor = self.base_layer.weight
        return weight

    def _dense(self) -> Tensor:
        weight = self._stored()
        if weight.device.type == "meta":
            raise MergeError(
                "got a layer whose weight is not in memory (device meta: offloaded by accelerate, or never loaded); it "
                "cannot be merged where it is; use merge_and_unload or merge_adapter of the model, which load it first"
            )
        if not weight.is_floating_point():
            raise MergeError(
                f"got a weight of {weight.dtype}, which no quantisation backend knows; only floating-point weights and "
                "those PEFT has a backend for can be merged; keep the adapter unmerged"
            )
        return weight

    def _merge_weight(self, dense: Tensor, rotations: WeightRotations, exact: ExactUnmerge) -> tuple[Any, Any]:
        tied = self._untie()
        with undone_if_raised(lambda: self._tie(tied)):
            return rotate_in_place(self._dense(), rotations, self._dim, exact), tied

    def unmerge(self, merge: Merge) -> None:
        assert isinstance(merge.weight, UndoRecord)
        if merge.tied is not None:
            self._tie(merge.tied)
        else:
            restore_in_place(self._dense(), merge.weight, self._dim)
        self._unmerge_bias(merge.bias)

    def _untie(self) -> nn.Parameter | None:
        """Give a weight that another module uses too (a tied embedding) a copy of its own; returns the shared one."""
        if not getattr(self.base_layer, "_roadie_weight_is_shared", False):
            return None
        shared = self.base_layer.weight
        logger.warning(
            "merging into a weight that another module shares (tied embeddings): it is untied first, so that the other "
            "module keeps its own; the model's output layer and embeddings are no longer the same tensor while merged"
        )
        self.base_layer.weight = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
        self.base_layer._roadie_weight_is_shared = False
        return shared

    def _tie(self, shared: nn.Parameter | None) -> None:
        if shared is not None:
            self.base_layer.weight = shared
            self.base_layer._roadie_weight_is_shared = True


class StackedWeight(DenseWeight):
    """One projection of stacked experts, as blocks ``[E, parts, D / parts, in]`` of its weight and its bias; see `Projection`."""

    def __init__(self, projection: Projection) -> None:
        super().__init__(projection.experts)
        self._projection = projection
        self._dim = self._dim_of_bias = None

    @property
    def bias(self) -> Tensor | None:
        bias = self._projection.bias
        return None if bias is None else self._projection.blocks(bias)

    def _stored(self) -> Tensor:
        return self._projection.blocks(self._projection.weight)

    def _untie(self) -> None:
        return None


@dataclass(frozen=True)
class QuantisedOriginal:
    """A quantised layer's weight (and backend state) as it was before a merge."""

    weight: Any
    attributes: dict[str, Any]  # of the weight; backends change some when they store another
    state: Any
    layer: nn.Module

    @property
    def nbytes(self) -> int:
        """Bytes of the stored weight, scales of tensor subclasses included; 0 where the backend does not say."""
        return _stored_bytes(self.weight) if isinstance(self.weight, Tensor) else 0


class QuantisedWeight(BaseWeight):
    """A quantised weight: dequantised, rotated, quantised again by its backend."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layer.get_base_layer())
        self.layer = layer
        self.backend = layer.quantization_backend

    def check_can_merge(self) -> None:
        if not self.backend.supports_merge:
            raise MergeError(
                f"got a {self.backend.backend_name} layer; its quantisation backend cannot store a changed weight, so "
                "nothing can be merged into it; keep the adapter unmerged, or merge into an unquantised model"
            )

    def _dense(self) -> Tensor:
        self.check_can_merge()
        packed = _unpacked_4bit(self.base_layer)
        return packed if packed is not None else self.backend.get_base_weight(self.base_layer).detach()

    def _merge_weight(self, dense: Tensor, rotations: WeightRotations, exact: ExactUnmerge) -> tuple[Any, Any]:
        undo, original = inverses(rotations), self._original()
        with undone_if_raised(lambda: self._put_back(original)):
            self.backend.set_base_weight(self.layer, rotated_rows(dense, rotations))
        if undo is None:
            return None, None
        return UndoRecord(undo, (), dense.dtype) if exact is ExactUnmerge.NEVER else original, None

    def unmerge(self, merge: Merge) -> None:
        if isinstance(merge.weight, UndoRecord):
            self.backend.set_base_weight(self.layer, rotated_rows(self._dense(), merge.weight.undo))
        else:
            self._put_back(merge.weight)
        self._unmerge_bias(merge.bias)

    def _original(self) -> QuantisedOriginal:
        weight = getattr(self.base_layer, "weight", None)
        attributes = dict(getattr(weight, "__dict__", {}))
        state = copy.copy(getattr(self.base_layer, "state", None))
        return QuantisedOriginal(weight, attributes, state, self.base_layer)

    def _put_back(self, original: Any) -> None:
        layer = original.layer
        if self.layer.get_base_layer() is not layer:  # HQQ stores a changed weight in a new layer
            self.layer.base_layer = layer
        if original.weight is not None:
            if "weight" in layer.__dict__:
                del layer.__dict__["weight"]
            layer.weight = original.weight
            original.weight.__dict__.update(original.attributes)
        if original.state is not None:
            layer.state = original.state


def _unpacked_4bit(base_layer: Any) -> Tensor | None:
    """The dense weight of a bitsandbytes 4-bit layer that a forward has repacked for this CPU; None for any other.

    PEFT's backend reads the usual layout only (bitsandbytes repacks in evaluation mode, on CPUs with avx512_bf16). The
    packed scales are bfloat16 ``[in / block, D]`` and never nested. bitsandbytes' own way back leaves them in that order
    or quantises them once more; here they stay those that the forward multiplies by.
    """
    weight = getattr(base_layer, "weight", None)
    state = getattr(weight, "quant_state", None)
    if weight is None or not getattr(state, "packing_format_for_cpu", False):
        return None
    from bitsandbytes import functional

    plain: Any = copy.copy(state)
    plain.original_nested = False
    codes, plain = functional._convert_weight_packed_for_cpu_inverse(weight.data, plain)
    plain.absmax = plain.absmax.T.reshape(-1).float()
    return functional.dequantize_4bit(codes, plain).detach()


def _stored_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor, of its parts where it is a subclass made of other tensors."""
    data = tensor.data
    if hasattr(data, "__tensor_flatten__"):
        return sum(_stored_bytes(getattr(data, name)) for name in data.__tensor_flatten__()[0])
    return int(data.numel() * data.element_size())


def base_weight(layer: Any) -> BaseWeight:
    """The weight of a RoAd layer's base layer."""
    base_layer = layer.get_base_layer()
    if hasattr(getattr(base_layer, "weight", None), "to_local"):
        raise MergeError(
            "got a weight that several processes share (a DTensor); wanted a whole one; save the adapter "
            "(roadie.distributed.full_adapter) and merge it in one process (roadie merge)"
        )
    return QuantisedWeight(layer) if layer.quantization_backend is not None else DenseWeight(base_layer)


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D, whose weight is ``[in, D]``."""
    return isinstance(module, Conv1D)

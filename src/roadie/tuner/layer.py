"""The RoAd layer: any linear layer, a rotation of its output, and where an adapter wants it one of its input.

ONE class over every kind of base weight: nn.Linear, transformers' Conv1D, and quantised layers through PEFT's
quantisation backends. The forward of a plain batch and of a mixed one is the same: tables of rotations, one row of
which (or one for each row of the batch) is applied to the base layer's output (`roadie.tuner.rotating`), and before to its
input (`roadie.tuner.inputs`).

Legend: D out features.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch
from peft.tuners.tuners_utils import _get_in_out_features
from peft.utils.quantization_utils import QuantizationBackend, quantization_extra_repr
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as _every_module

from roadie.algebra.chains import compose_chains
from roadie.errors import RoutingError, UnsupportedLayer
from roadie.linear import check_output, gives_fresh_memory, read_in_a_forward
from roadie.rotation import check_group_size, transposed
from roadie.tuner.config import RoadConfig
from roadie.tuner.inputs import RoadInput
from roadie.tuner.merged import MergedLayer
from roadie.tuner.merging import WeightRotations
from roadie.tuner.rotating import RoadLayer, check_variant, group_sizes_of, input_group_sizes_of
from roadie.tuner.routing import ARE_MERGED, adapter_rows
from roadie.tuner.weight import BaseWeight, base_weight, is_conv1d


class Linear(nn.Module, MergedLayer):
    """A linear layer of any kind whose output RoAd rotates, ``z = R (W x + b)``, and its input: ``z = R (W (R_in x) + b)``.

    Input ``[..., in]``, output ``[..., D]`` in the dtype the base layer gives. road_input: what rotates the input; None where
    none of the adapters does; path: where the layer is in its model, for messages.
    """

    path: str = "a RoAd layer"
    _told_of_reads: bool = False

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: RoadConfig,
        backend: QuantizationBackend | None = None,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.quantization_backend = backend
        self.in_features, out_features = linear_features(RoadLayer.get_base_layer(self), backend)
        MergedLayer.__init__(self, out_features)
        self.road_input: RoadInput | None = None
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config=config)

    def update_layer(self, adapter_name: str, config: RoadConfig, inference_mode: bool = False) -> None:
        """Add the adapter `adapter_name`, or start it anew; raises `ConfigError` with nothing changed."""
        stages, input_stages = group_sizes_of(config), input_group_sizes_of(config)
        check_sizes(config, self.in_features, self.out_features)
        self.add(adapter_name, config, stages, inference_mode)
        self._forget_input(adapter_name)
        if input_stages:
            self.road_input = self.road_input or RoadInput(self, self.in_features)
            self.road_input.add(adapter_name, config, input_stages, inference_mode)

    def _forget_input(self, adapter_name: str) -> None:
        if self.road_input is None:
            return
        self.road_input.delete_adapter(adapter_name)
        if not self.road_input.road_theta:
            del self.road_input
            self.road_input = None

    def forward(self, x: Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Tensor:
        """Rotate the input, run the base layer and rotate its output.

        x: ``[..., in]``; adapter_names: one adapter name for each row of x (usually given to the model, not here).
        Raises `RoutingError` where rows are routed and adapters are merged, or the numbers of rows differ.
        """
        if not torch.compiler.is_compiling() and adapter_names is None and not args and not kwargs:
            by = self._routing.by.get() or self._by_itself()
            if by is not None:
                y = self._with_plain_base(by, x)
                if y is not None:
                    return y
        if adapter_names is not None:
            with adapter_rows(self, adapter_names, 1) as choice:
                choice.starts(self, (x,), kwargs)
                return self.forward(x, *args, **kwargs)
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            self._check_not_routed()
            return self.base_layer(x, *args, **kwargs)
        if self.road_input is not None:
            x = self.road_input(x)
        y = self.base_layer(x, *args, **kwargs)
        check_output(y, self.base_layer, self.path)
        return self._rotated(y, gives_fresh_memory(self.base_layer))

    def _with_plain_base(self, by: object, x: Tensor) -> Tensor | None:
        """As forward, once it is known what the layer rotates by; None, with nothing computed, where the base layer is not plain.

        The base layer is not called but computed, as `nn.Linear` does it: without its hooks, of which it has none. All in one
        function, because each call of one costs microseconds here (`roadie.kernels.cpu`).
        """
        modules = self._modules
        base = modules["base_layer"]
        weight = base._parameters.get("weight")  # type: ignore[union-attr]
        if (
            self._disable_adapters
            or self.merged_adapters
            or type(base) is not nn.Linear
            or type(weight) is not nn.Parameter
            or base._forward_hooks
            or base._forward_pre_hooks
            or "forward" in base.__dict__
            or _every_module._global_forward_hooks
            or _every_module._global_forward_pre_hooks
        ):
            return None
        is_trained = torch.is_grad_enabled()
        if is_trained and (
            base._backward_hooks
            or base._backward_pre_hooks
            or _every_module._global_backward_hooks
            or _every_module._global_backward_pre_hooks
        ):
            return None
        inputs = modules.get("road_input")
        y = nn.functional.linear(x if inputs is None else inputs(x), weight, base._parameters["bias"])
        last = None if is_trained or forward_ad._current_level >= 0 else self._kept.last
        return y if last is not None and last.by is by and last.rotate(y) else self._rotated(y, True)

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, which no adapter is part of before it is merged.

        Warns, once, where a model's forward computes with it while an adapter is in force, which then has no effect there.
        """
        if not torch.compiler.is_compiling() and not self._told_of_reads and self._is_in_force():
            self._tell_of_read(sys._getframe(1))
        base: Any = RoadLayer.get_base_layer(self)
        weight: Tensor = base.qweight if hasattr(base, "qweight") else base.weight
        return weight

    def _tell_of_read(self, frame: FrameType) -> None:
        if read_in_a_forward(frame):
            self._told_of_reads = True
            warnings.warn(
                f"{frame.f_code.co_filename}:{frame.f_lineno} computes with the weight of {self.path}, which is adapted, and "
                "does not call the layer: the adapter has no effect and no gradient there, and merging changes the outputs. Put "
                "the layer into exclude_modules.",
                RuntimeWarning,
                stacklevel=3,
            )

    def _check_not_routed(self) -> None:
        if self.merged and self._routing.current() is not None:
            raise RoutingError(ARE_MERGED)

    def _weight_rotations(self, names: Sequence[str]) -> WeightRotations:
        rows, inputs = super()._weight_rotations(names), self.road_input
        if inputs is None:
            return rows
        with torch.no_grad():
            # A row w of W becomes R^T w; of a chain the last is the first that stands beside W.
            here = [name for name in names if name in inputs.road_theta]
            columns = [transposed(rotation) for name in here for rotation in reversed(inputs.rotations(name))]
            return WeightRotations(rows.rows, compose_chains(columns, ()))

    def _base_weight(self) -> BaseWeight:
        return base_weight(self)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        if not self.merged and any(name in self.road_theta for name in names):
            self._check_not_held()
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        if self.road_input is not None:
            self.road_input.set_adapter(adapter_names, inference_mode=inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        RoadLayer.enable_adapters(self, enabled)
        if self.road_input is not None:
            RoadLayer.enable_adapters(self.road_input, enabled)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        RoadLayer.set_requires_grad(self, adapter_names, requires_grad)
        if self.road_input is not None:
            RoadLayer.set_requires_grad(self.road_input, adapter_names, requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._forget_input(adapter_name)

    def clear_cache(self) -> None:
        super().clear_cache()
        if self.road_input is not None:
            self.road_input.clear_cache()

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)

    def __repr__(self) -> str:
        return "road." + super().__repr__()


def check_sizes(config: Any, in_features: int, out_features: int) -> None:
    """Raise `ConfigError` unless the variant and the group sizes of a config fit a layer of these sizes."""
    check_variant(config.variant)
    for group_size in group_sizes_of(config):
        check_group_size(group_size, out_features)
    for group_size in input_group_sizes_of(config):
        check_group_size(group_size, in_features, "in_features")


def linear_features(base_layer: nn.Module, backend: QuantizationBackend | None) -> tuple[int, int]:
    """(in_features, out_features) of a layer RoAd can adapt; raises `UnsupportedLayer` for any other kind."""
    quantised = backend is not None and backend.layer_type == "linear"
    if not (isinstance(base_layer, nn.Linear) or is_conv1d(base_layer) or quantised):
        raise UnsupportedLayer(
            f"Unsupported layer type '{type(base_layer)}' encountered, cannot apply RoAd adapter. RoAd adapts linear "
            "layers: torch.nn.Linear, transformers' Conv1D and their quantised kinds; leave this module out of "
            "target_modules, or put it into exclude_modules."
        )
    in_features, out_features = _get_in_out_features(base_layer)
    if in_features is None or out_features is None:
        raise UnsupportedLayer(f"Unsupported layer type '{type(base_layer)}' encountered: its sizes are not known.")
    return int(in_features), int(out_features)

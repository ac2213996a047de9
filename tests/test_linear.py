"""Which layers cannot be adapted: weights that are read without a call, and outputs that are no tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from roadie.errors import UnsupportedLayer
from roadie.linear import check_named, refusals, weight_reads, without_refused


class _Reader(nn.Module):
    """A module with a linear layer, of whose weight its methods do something; settings: attributes."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.list = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.slices, self.exact, self.clip = 1, False, None
        for name, value in settings.items():
            setattr(self, name, value)


class _Multiplies(_Reader):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.layer.weight.t()


class _InAMethod(_Reader):
    def forward(self, x: Tensor) -> Tensor:
        return self._projected(x)

    def _projected(self, x: Tensor) -> Tensor:
        return F.linear(x, self.list[0].weight) + self.layer(x)


class _OnlyInTraining(_Reader):
    def forward(self, x: Tensor, cache: Any = None) -> Tensor:
        if self.training and cache is None:
            return F.linear(x, self.layer.weight)
        return self.layer(x)


class _OnlyWithSlices(_Reader):
    """As Bloom: where a setting says so."""

    def forward(self, x: Tensor) -> Tensor:
        if self.slices > 1 and self.exact:
            return F.linear(x, self.layer.weight)
        return self.layer(x)


class _UnlessPlain(_Reader):
    def forward(self, x: Tensor) -> Tensor:
        if self.clip is None:
            return self.layer(x)
        return F.linear(x, self.layer.weight.clamp(-self.clip, self.clip))


class _OnlyWithAnArgument(_Reader):
    """As DeBERTa: nobody gives the argument."""

    def forward(self, x: Tensor, query: Tensor | None = None) -> Tensor:
        if query is None:
            return self.layer(x)
        return F.linear(query, self.layer.weight)


class _UnlessQuantised(_Reader):
    """As Jamba, with a setting that cannot even be read."""

    @property
    def broken(self) -> bool:
        raise RuntimeError

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "is_quantised"):
            return F.linear(x, self.layer.weight)
        return self.list[0](x) if self.broken else F.linear(x, self.list[1].weight)


class _Looks(_Reader):
    """As T5, and as RWKV, which rescales weights in place before it calls."""

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.layer.weight, Tensor) and x.dtype != self.layer.weight.dtype:
            x = x.to(self.layer.weight.dtype, copy=True).view(
                -1, self.layer.weight.shape[1], self.list[0].weight.size(0)
            )
        if self.layer.weight is not None and hasattr(self.layer.weight, "quant_state"):
            self.layer.weight.data.clamp_(-1, 1)
            self.layer.weight.mul_(2)
        return self.layer(x)


class _OnlyAtTheStart(_Reader):
    def __init__(self) -> None:
        super().__init__()
        self.start()

    def start(self) -> None:
        self.layer.weight.data.copy_(self.list[0].weight.data + 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class _AsksItsPart(nn.Module):
    """The read is in a method of a part, which is no forward; as Gemma 3n."""

    def __init__(self) -> None:
        super().__init__()
        self.part = _Part()

    def forward(self, x: Tensor) -> Tensor:
        return self.part.correct(x)


class _Part(_Reader):
    def correct(self, x: Tensor) -> Tensor:
        return F.linear(x, self.layer.weight)


@pytest.mark.parametrize(
    ("module", "paths"),
    [
        (_Multiplies(), {"layer"}),
        (_InAMethod(), {"list.0", "list.1"}),
        (_OnlyInTraining(), {"layer"}),
        (_OnlyWithSlices(), set()),
        (_OnlyWithSlices(slices=2), set()),
        (_OnlyWithSlices(slices=2, exact=True), {"layer"}),
        (_UnlessPlain(), set()),
        (_UnlessPlain(clip=1.0), {"layer"}),
        (_OnlyWithAnArgument(), set()),
        (_UnlessQuantised(), {"layer"}),
        (_UnlessQuantised(is_quantised=True), {"list.0", "list.1"}),
        (_Looks(), set()),
        (_OnlyAtTheStart(), set()),
        (_AsksItsPart(), {"part.layer"}),
        (nn.MultiheadAttention(4, 2), {"out_proj"}),
        (nn.TransformerEncoderLayer(4, 2, 8), {"linear1", "linear2", "self_attn.out_proj"}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_reads_of_a_weight_are_told_from_looks_and_calls(module: nn.Module, paths: set[str]) -> None:
    assert {path for path in weight_reads(module) if isinstance(module.get_submodule(path), nn.Linear)} == paths


class _Router(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        logits = super().forward(x)
        return logits.softmax(-1), logits


class _Grouped(nn.Linear):
    """The outputs of each group for inputs of its own: ``[..., groups, in]`` to ``[..., groups, out / groups]``."""

    groups = 4

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.view(self.groups, -1, self.in_features).transpose(1, 2)
        y = torch.bmm(x.reshape(-1, self.groups, self.in_features).transpose(0, 1), weight)
        return y.transpose(0, 1).reshape(*x.shape[:-2], self.groups, -1)


class _Wider(nn.Linear):
    """As Idefics' decoupled layers: further outputs from a further layer."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.further = nn.Linear(sizes[0], 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super().forward(x), self.further(x)], dim=-1)


class _Plain(nn.Linear):
    """As Falcon's: another way to compute the same."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


class _NeedsItsDevice(nn.Linear):
    """As quantised layers: it cannot run without values, and is taken for what it says it is."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * float(self.weight.abs().max())


def test_layers_that_give_something_else_are_told_without_running_them() -> None:
    layers = nn.ModuleDict(
        {cls.__name__: cls(8, 12) for cls in (_Router, _Grouped, _Wider, _Plain, _NeedsItsDevice, nn.Linear)}
    )
    layers["float16"] = _Router(8, 12).half()
    state, calls = torch.random.get_rng_state(), []
    layers["_Router"].register_forward_hook(lambda *_: calls.append(1))
    reasons = refusals(layers)
    assert set(reasons) == {"_Router", "_Grouped", "_Wider", "float16"}
    assert "_Router gives a tuple of 2" in reasons["_Router"]
    assert "[14]" in reasons["_Wider"]
    assert "12" in reasons["_Wider"]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not calls


def test_those_named_are_refused_and_those_meant_by_all_are_left_out_in_one_line(caplog: Any) -> None:
    model = nn.Sequential(_Multiplies(), _Multiplies(), nn.Linear(4, 4))
    with pytest.raises(UnsupportedLayer, match=r"'1\.layer'.*_Multiplies\.forward reads its weight"):
        check_named(model, ["2", "1.layer"])
    check_named(model, ["2", "1.list.0"])
    assert without_refused(model, ["0.layer", "1.layer", "2"]) == ["2"]
    (record,) = caplog.records
    assert "*.layer (2)" in record.getMessage()
    assert record.name == "roadie"

"""What some versions cannot do, the oldest supported ones above all, with the reason: marks for tests."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import pytest
import torch
from packaging.version import Version


def installed(name: str) -> Version | None:
    """The version of a package; None where it is not installed."""
    try:
        return Version(version(name))
    except PackageNotFoundError:
        return None


TORCH = Version(version("torch"))

needs_a_compiler_of_whole_models = pytest.mark.skipif(
    Version("2.7") > TORCH, reason="torch 2.6 cannot trace the context managers of PEFT's and transformers' forward"
)

needs_a_compiler_that_recomputes_copies = pytest.mark.skipif(
    Version("2.13") > TORCH,
    reason="torch 2.11 keeps a copy of x, in pairs, for the backward of a compiled graph; 2.13 makes it again",
)

needs_a_compiler_of_changed_tables = pytest.mark.skipif(
    Version("2.13") > TORCH,
    reason="torch 2.11 refuses, when it compiles, what a graph saves of its own operations and changes in place later",
)

OLD_TYPER = Version("0.20") > Version(version("typer"))
"""The oldest typer imports rich when it is imported itself."""

_TORCHAO = installed("torchao")
_OLD_TORCHAO = _TORCHAO is not None and Version("0.18") > _TORCHAO

needs_torchao = pytest.mark.skipif(_TORCHAO is None, reason="torchao is not installed: pip install roadie[quant]")
needs_torchao_018 = pytest.mark.skipif(
    _OLD_TORCHAO,
    reason="before 0.18 torchao's int8 is an AffineQuantizedTensor: not compared by torch.equal, not saved",
)
needs_torchao_018_to_merge = pytest.mark.skipif(
    _OLD_TORCHAO,
    reason="before 0.18 torchao cannot dequantise int8 with quantised inputs, so PEFT cannot merge into it",
)

TRANSFORMERS = Version(version("transformers"))
OLD_TRANSFORMERS = Version("5.23") > TRANSFORMERS  # tested: 5.0, 5.17 and 5.23
NO_ENGINE = Version("5.17") > TRANSFORMERS
"""The server's engine needs continuous batching that transformers 5.0 does not have."""

needs_stacked_experts = pytest.mark.skipif(
    Version("5.17") > TRANSFORMERS, reason="transformers 5.0 does not say how stacked experts lie in memory"
)

needs_a_cache_that_lets_old_prefixes_go = pytest.mark.skipif(
    OLD_TRANSFORMERS, reason="transformers 5.17 takes the blocks of prefixes that were used last, where it needs some"
)

EVALUATES_AFTER_THE_LAST_STEP = Version("5.17") <= TRANSFORMERS
"""The oldest transformers do so only where an interval ends with the last step."""

needs_uploads_by_an_api_object = pytest.mark.skipif(
    OLD_TRANSFORMERS,
    reason="transformers 5.0 uploads by functions, where this test puts methods in the place of HfApi's",
)

needs_trainer_to_resume_on_several_cpus = pytest.mark.skipif(
    OLD_TRANSFORMERS and Version("1.11") <= Version(version("accelerate")),
    reason="transformers 5.17 loads the optimizer to accelerate's device, cpu:0 from several processes, which torch refuses",
)

needs_trainer_to_resume_several_adapters = pytest.mark.skipif(
    OLD_TRANSFORMERS, reason="transformers 5.17 does not load the adapter 'default' where a checkpoint has others too"
)

_TRITON = installed("triton")

needs_loops_in_the_interpreter = pytest.mark.skipif(
    _TRITON is not None and Version("3.7") > _TRITON and Version("2.4") <= Version(version("numpy")),
    reason="before 3.7 Triton's interpreter makes the bounds of loops of arrays of one element, which numpy 2.4 refuses",
)
"""For kernels with loops whose number of turns is a tensor of the kernel."""


def _multiplies_int8_exactly() -> bool:
    """Whether torch's products of int8 are right: without VNNI oneDNN adds pairs of them in 16 bits, which overflow."""
    most = torch.full((32, 128), 127, dtype=torch.int8)
    return bool((torch._int_mm(most, most.T.contiguous()) == 127 * 127 * 128).all())


needs_exact_products_of_int8 = pytest.mark.skipif(
    not _multiplies_int8_exactly(), reason="torch's products of int8 overflow on this processor, which has no VNNI"
)

needs_grammars = pytest.mark.skipif(
    installed("llguidance") is None, reason="answers are kept to constraints where llguidance is installed"
)

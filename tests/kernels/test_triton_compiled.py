"""The Triton kernels compiled for GPUs, which needs none: that they compile, and what the compiler made of them.

Compiling and interpreting exclude each other in a process, so that this file runs itself in another one.
"""

from __future__ import annotations

import inspect
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")
pytest.importorskip("triton.backends.nvidia", reason="a build of triton without NVIDIA's compiler")
if "constexprs" not in inspect.signature(triton.compiler.ASTSource).parameters:
    pytest.skip("before Triton 3.3 a kernel is compiled by other calls", allow_module_level=True)

HOPPER, AMPERE, MI300 = ("cuda", 90, 32), ("cuda", 80, 32), ("hip", "gfx942", 64)
POINTERS = {"slots": "*i64", "order": "*i64", "bounds": "*i64", "ends": "*i64", "group": "*i64", "sizes": "*i32"}
SUMS = ("own", "partner", "partial")
# By 16, as are the distances of rows: so it is in the layers of most models.
DIVISIBLE = ("num_pairs", "width", "in_features")


def compiled(kernel: Any, dtype: str, target: tuple[Any, ...], constants: dict[str, Any], **options: Any) -> str:
    """The assembly of a kernel for activations of `dtype`, tables in float32, and tensors that are aligned to 16 bytes."""
    from triton.backends.compiler import GPUTarget

    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        is_table = name in ("direct", "cross", *SUMS)
        is_activation = name in ("x", "out", "grad", "kept", "grad_x", "weight", "bias")
        kind = POINTERS.get(name) or ("*fp32" if is_table else f"*{dtype}" if is_activation else "i32")
        signature[name] = "constexpr" if name in constants else kind
        if kind[0] == "*" or name.endswith("stride") or name in DIVISIBLE:
            attributes[(position,)] = [["tt.divisibility", 16]]
    made = triton.compile(
        triton.compiler.ASTSource(kernel, signature, constants, attributes), GPUTarget(*target), options
    )
    return str(made.asm.get("ptx") or made.asm["amdgcn"])


def rotation_of(
    dtype: str, target: tuple[Any, ...], group_size: int, *, in_place: bool = True, mixed: bool = False
) -> str:
    from roadie.kernels.triton import rotation, tiles

    half, split = tiles.halves(group_size, uniform=group_size > 0)
    tile = tiles.rotate_tile(1, 4096, 2048)
    constants = {"HALF": half, "SPLIT": split, "LIKELY": tiles.LIKELY_HALF, "TRANSPOSED": False, "MIXED": mixed}
    constants["IN_PLACE"] = in_place
    constants |= {"ROWS": tile.rows, "PAIRS": tile.pairs, "STEPS": tile.steps}
    return compiled(rotation.rotate_kernel, dtype, target, constants, num_warps=tile.warps, enable_fp_fusion=False)


def backward_of(dtype: str, target: tuple[Any, ...], group_size: int, *, mixed: bool = False) -> str:
    from roadie.kernels.triton import backward, tiles

    half, split = tiles.halves(group_size, uniform=group_size > 0)
    tile = tiles.backward_tile(4096, 2048)
    constants = {"HALF": half, "SPLIT": split, "MIXED": mixed, "WANT_X": True}
    constants |= {"ROWS": tile.rows, "PAIRS": tile.pairs, "STEPS": tile.steps, "SOLVE": 0}
    return compiled(backward.backward_kernel, dtype, target, constants, num_warps=tile.warps, enable_fp_fusion=False)


def reduction_of(target: tuple[Any, ...]) -> str:
    from roadie.kernels.triton import backward

    constants = {
        "HALF": 32,
        "SPLIT": 0,
        "MIXED": True,
        "TASKS": backward.TASKS_AT_ONCE,
        "PAIRS": backward.PAIRS,
        "SOLVE": 2,
    }
    return compiled(backward.reduce_kernel, "fp32", target, constants, enable_fp_fusion=False)


def product_of(dtype: str, target: tuple[Any, ...], *, mixed: bool = True) -> str:
    import torch

    from roadie.kernels.triton import matmul

    tile = matmul.product_tile(4096, torch.bfloat16 if dtype == "bf16" else torch.float32)
    constants = {
        "HALF": 32,
        "SPLIT": 0,
        "HAS_BIAS": True,
        "MIXED": mixed,
        "WHOLE_DEPTH": True,
        "WIDEN": False,
        "BAND": matmul.BAND,
    }
    constants |= {"ROWS": tile.rows, "PAIRS": tile.pairs, "DEPTH": tile.depth}
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    return compiled(matmul.linear_rotate_kernel, dtype, target, constants, **options)


def all_of_them() -> dict[str, str]:
    return {
        "in place": rotation_of("bf16", HOPPER, 64),
        "out of place": rotation_of("bf16", HOPPER, 64, in_place=False),
        "float32": rotation_of("fp32", AMPERE, 64),
        "neighbours": rotation_of("bf16", AMPERE, 2),
        "halves of three": rotation_of("fp16", AMPERE, 6),
        "sizes": rotation_of("bf16", HOPPER, 0, mixed=True),
        "backward": backward_of("bf16", HOPPER, 64),
        "backward, mixed": backward_of("fp16", AMPERE, 0, mixed=True),
        "backward, neighbours": backward_of("fp32", AMPERE, 2),
        "reduction": reduction_of(HOPPER),
        "product": product_of("bf16", HOPPER),
        "product, float32": product_of("fp32", AMPERE, mixed=False),
        "MI300": rotation_of("bf16", MI300, 64),
        "MI300, backward": backward_of("bf16", MI300, 64, mixed=True),
    }


@pytest.fixture(scope="module")
def assembly(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
    }
    run = subprocess.run([sys.executable, Path(__file__)], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.slow
def test_they_compile(assembly: dict[str, str]) -> None:
    assert all(assembly.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["in place", "out of place", "float32", "neighbours", "backward", "backward, neighbours"]
)
def test_memory_is_moved_in_16_bytes(assembly: dict[str, str], name: str) -> None:
    """Both members of a tile of 8 pairs a thread: each load and each store of the batch moves 16 bytes."""
    code = assembly[name]
    assert code.count("ld.global.v4.b32") >= 2
    assert code.count("st.global.v4.b32") >= 2
    assert "global.b16" not in code


@pytest.mark.parametrize(
    "name", ["in place", "float32", "neighbours", "halves of three", "sizes", "backward", "reduction"]
)
def test_products_and_sums_are_rounded_each_by_itself(assembly: dict[str, str], name: str) -> None:
    assert "fma.rn" not in assembly[name].replace("fma.rn.bf16", "")
    assert "mul.f32" in assembly[name] or "mul.rn.f32" in assembly[name]


@pytest.mark.parametrize("name", ["backward", "backward, mixed", "backward, neighbours", "reduction"])
def test_sums_use_no_atomic_additions(assembly: dict[str, str], name: str) -> None:
    assert "atom." not in assembly[name]
    assert "red.global" not in assembly[name]


def test_in_place_all_is_loaded_before_anything_is_stored(assembly: dict[str, str]) -> None:
    for name in ("in place", "halves of three"):
        before, barrier, after = assembly[name].rpartition("bar.sync")
        assert barrier, "no barrier"
        assert "st.global" in after
        assert "ld.global" not in after
        assert "st.global" not in before


def test_slots_with_sizes_of_their_own_are_read_fast_where_these_are_the_likely_ones(assembly: dict[str, str]) -> None:
    """There is a way for them, by wide loads, and one for all others; in each all is loaded before anything is stored."""
    code = assembly["sizes"]
    assert code.count("ld.global.v4.b32") >= 2
    assert code.count("st.global.v4.b32") >= 2
    assert "global.b16" in code
    steps = re.findall(r"bar\.sync|(?:ld|st)\.global", code)
    assert steps.count("bar.sync") >= 2
    assert not any(pair == ("ld.global", "st.global") for pair in itertools.pairwise(steps))


def test_the_product_uses_the_matrix_units(assembly: dict[str, str]) -> None:
    assert "wgmma.mma_async" in assembly["product"]
    assert "tf32" not in assembly["product, float32"]


if __name__ == "__main__":
    print(json.dumps(all_of_them()))

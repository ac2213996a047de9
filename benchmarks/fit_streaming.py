"""Fitting a model that is larger than what may be held: private memory and time on a synthetic checkpoint of 4 GB.

A base of Llama-2-7B's layers, ten blocks of them, bfloat16, in shards of 200 MB; the same with every linear layer turned, in
shards of 200 MB too, filled in the opposite order, so that no shard of one has the tensors of a shard of the other. The fit runs
in a process of its own; meanwhile RssAnon of /proc/PID/status is read every millisecond: private memory, without the pages of
memory-mapped files, which the system takes back when it needs them.

    python -m benchmarks.fit_streaming BASE TUNED      what that process does
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.machine import ROOT
from roadie import fit
from roadie.rotation import Rotation, from_parameters, rotate_weight

MOST_PAIRS = 4
"""Private memory above the start may be so many times the largest pair of tensors."""
GROUP_SIZE = 64


@dataclass(frozen=True)
class Size:
    """The synthetic model: its blocks, the width of their layers, and the bytes of a shard."""

    blocks: int = 10
    hidden: int = 4096
    intermediate: int = 11008
    shard_bytes: int = 200_000_000

    def layers(self) -> Iterator[tuple[str, int, int]]:
        """Path, outputs and inputs of every linear layer."""
        for block in range(self.blocks):
            at = f"model.layers.{block}"
            yield from ((f"{at}.self_attn.{name}_proj", self.hidden, self.hidden) for name in "qkvo")
            yield from ((f"{at}.mlp.{name}_proj", self.intermediate, self.hidden) for name in ("gate", "up"))
            yield f"{at}.mlp.down_proj", self.hidden, self.intermediate

    @property
    def pair_bytes(self) -> int:
        """The largest weight, in the base and in the tuned model."""
        return 2 * 2 * self.hidden * max(self.hidden, self.intermediate)


def weight_of(path: str, outputs: int, inputs: int) -> Tensor:
    """The base's weight, always the same for a path."""
    generator = torch.Generator().manual_seed(sum(path.encode()) * 7919 + len(path))
    return (0.02 * torch.randn(outputs, inputs, generator=generator)).bfloat16()


def turn_of(path: str, outputs: int) -> Rotation:
    """The rotation of the tuned model's layer, always the same for a path."""
    generator = torch.Generator().manual_seed(sum(path.encode()))
    theta, alpha = 0.1 * torch.randn(2, outputs, generator=generator, dtype=torch.float64)
    return from_parameters(theta, 1 + alpha, "road_2", GROUP_SIZE)


def write_model(folder: Path, size: Size, *, turned: bool) -> int:
    """Write the base or the turned model; the bytes of all shards. The turned one is written from the last layer to the first."""
    folder.mkdir()
    layers = list(size.layers())
    places: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    for path, outputs, inputs in reversed(layers) if turned else layers:
        weight = weight_of(path, outputs, inputs)
        if turned:
            weight = rotate_weight(weight, turn_of(path, outputs))
        if shard and sum(t.nbytes for t in shard.values()) + weight.nbytes > size.shard_bytes:
            _write_shard(folder, shard, places)
        shard[f"{path}.weight"] = weight.contiguous()
    _write_shard(folder, shard, places)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _write_shard(folder: Path, shard: dict[str, Tensor], places: dict[str, str]) -> None:
    name = f"model-{len(set(places.values())):05d}.safetensors"
    save_file(shard, folder / name)
    places.update(dict.fromkeys(shard, name))
    shard.clear()


def measure(size: Size = Size()) -> dict[str, Any]:
    """Write both models into a temporary folder, fit, and remove them."""
    with TemporaryDirectory(prefix="roadie-fit-") as name:
        folder, needed = Path(name), int(2.5 * sum(2 * o * i for _, o, i in size.layers()))
        if shutil.disk_usage(folder).free < needed:
            raise SystemExit(f"got less than {needed / 1e9:.0f} GB free in {folder}; set TMPDIR to another disk")
        sizes = {kind: write_model(folder / kind, size, turned=kind == "tuned") for kind in ("base", "tuned")}
        shards = {kind: len(list((folder / kind).glob("*.safetensors"))) for kind in sizes}
        found = _watched(
            [sys.executable, "-m", "benchmarks.fit_streaming", str(folder / "base"), str(folder / "tuned")]
        )
    return {
        "size": asdict(size),
        "model_bytes": sizes,
        "shards": shards,
        "pair_bytes": size.pair_bytes,
        "bound_bytes": MOST_PAIRS * size.pair_bytes,
        **found,
    }


def _watched(command: Sequence[str]) -> dict[str, Any]:
    """What the process says, and by how much its private memory rises at most after it said that it starts."""
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        status = Path(f"/proc/{process.pid}/status")
        start = peak = _private(status)
        process.stdin.write("go\n")
        process.stdin.flush()
        samples = 0
        while process.poll() is None:
            peak = max(peak, _private(status))
            samples += 1
            time.sleep(0.001)
        if process.returncode:
            raise RuntimeError(f"the fit failed with status {process.returncode}")
        said: dict[str, Any] = json.loads(process.stdout.readline())
    return {**said, "private_bytes_at_start": start, "private_bytes_above": peak - start, "samples": samples}


def _private(status: Path) -> int:
    """RssAnon in bytes; 0 of a process that has ended."""
    lines = [line for line in status.read_text().splitlines() if line.startswith("RssAnon:")]
    return int(lines[0].split()[1]) * 1024 if lines else 0


def main(base: str, tuned: str) -> None:
    """Say that everything is loaded, wait, fit, and say how long it took and how wrong it is."""
    torch.zeros(1)  # everything that torch loads at its first use is loaded at the start
    print("ready", flush=True)
    sys.stdin.readline()
    start = time.perf_counter()
    found = fit.from_checkpoints(base, tuned, group_size=GROUP_SIZE)
    seconds = time.perf_counter() - start
    wrong = 0.0
    for path, layer in found.adapter.layers.items():
        wanted, got = turn_of(path, layer.out_features), layer.rotation
        wrong = max(
            wrong, *(float((a - b).abs().max()) for a, b in ((wanted.direct, got.direct), (wanted.cross, got.cross)))
        )
    said = {
        "seconds": seconds,
        "largest_error": wrong,
        "layers": len(found.layers),
        "share_explained": found.share_explained,
    }
    print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

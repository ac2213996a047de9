"""SkyRL's JaxBackend as `benchmarks.tenants_beside` drives it: a script for its own environment, which has no roadie.

    PYTHON -P benchmarks/tenants_skyrl.py JOB.json      (-P: the folder of this file has a module `statistics`)

The backend is called in process, as SkyRL's engine calls it; what comes out is a line of JSON, the last of stdout. Whatever is
timed has run before, so that nothing is compiled then.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any


def make_importable() -> None:
    """SkyRL 0.3.0 says Python 3.11 and gives pydantic a TypedDict of `typing`, which it takes from 3.12 on."""
    if sys.version_info < (3, 12):
        import typing

        import typing_extensions

        typing.TypedDict = typing_extensions.TypedDict


def resident_bytes() -> int:
    """Of this process, now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def timed(rounds: int, *actions: Callable[[], object]) -> list[list[float]]:
    """Of each action, in turn, the processor seconds of all threads, of each time but a first."""
    found: list[list[float]] = [[] for _ in actions]
    for _ in range(rounds + 1):
        for action, into in zip(actions, found, strict=True):
            begin = time.process_time()
            action()
            into.append(time.process_time() - begin)
    return [each[1:] for each in found]


def shares(count: int, tenants: int) -> list[int]:
    """For each of so many rows the number of its tenant: equal parts, in order."""
    return [row * tenants // count for row in range(count)]


class Rival:
    """The backend with some tenants, all LoRA of one rank on all linear layers."""

    def __init__(self, job: dict[str, Any]) -> None:
        make_importable()
        from skyrl.backends.jax import JaxBackend, JaxBackendConfig
        from skyrl.tinker import types

        self.job, self.types, self.tenants = job, types, 0
        config = JaxBackendConfig(max_lora_adapters=job["slots"], max_lora_rank=job["rank"])
        self.backend = JaxBackend(job["model"], config)
        self.checkpoints = 0

    def grow(self, tenants: int) -> None:
        """Have so many tenants."""
        for number in range(self.tenants, tenants):
            lora = self.types.LoraConfig(rank=self.job["rank"], alpha=16.0, seed=number)
            self.backend.create_model(str(number), lora)
        self.tenants = tenants

    def _input(self, tokens: list[int]) -> Any:
        return self.types.ModelInput(chunks=[self.types.EncodedTextChunk(tokens=tokens)])

    def forward_backward(self) -> dict[str, Any]:
        """All rows in one call."""
        rows, owners = self.job["rows"], shares(len(self.job["rows"]), self.tenants)
        names = [str(owner) for owner in owners]
        width = len(rows[0]) - 1
        slices = [
            (name, name, owners.index(int(name)), len(owners) - owners[::-1].index(int(name))) for name in set(names)
        ]
        batch = self.types.PreparedModelPassBatch(
            all_model_inputs=[self._input(row[:-1]) for row in rows],
            all_targets=[row[1:] for row in rows],
            all_token_weights=[[1.0] * width for _ in rows],
            all_sampling_logprobs=[[0.0] * width for _ in rows],
            all_advantages=[[0.0] * width for _ in rows],
            all_values=[[] for _ in rows],
            all_returns=[[] for _ in rows],
            all_model_ids=names,
            all_loss_fns=["cross_entropy"] * len(rows),
            all_loss_fn_configs=[None] * len(rows),
            request_batch_slices=slices,
        )
        return dict(self.backend.forward_backward(batch))

    def logprobs(self) -> list[list[float]]:
        """Of the targets of each row; one tenant."""
        outputs = self.forward_backward()["0"].loss_fn_outputs
        return [output["logprobs"]["data"] for output in outputs]

    def step(self) -> None:
        """An optimiser's step of every tenant."""
        for number in range(self.tenants):
            self.step_of(number)

    def step_of(self, number: int) -> None:
        """Of one."""
        adam = self.types.AdamParams(learning_rate=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0)
        self.backend.optim_step(str(number), self.types.OptimStepInput(adam_params=adam))

    def sample(self, number: int, *, is_new: bool) -> None:
        """A token of a tenant: by weights that are saved for it now, or by those that were saved before."""
        name = str(number)
        self.checkpoints += is_new
        checkpoint = str(self.checkpoints)
        path = Path(self.job["folder"]) / name / f"{checkpoint}.tar.gz"
        if is_new:
            self.backend.save_sampler_checkpoint(path, name)
        rules = self.types.SamplingParams(temperature=1.0, max_tokens=1, seed=1)
        batch = self.types.PreparedSampleBatch(
            all_model_inputs=[self._input(self.job["prompt"])],
            all_sampling_params=[rules],
            all_model_ids=[name],
            all_checkpoint_ids=[checkpoint],
            all_checkpoint_paths=[str(path)],
            all_session_ids=[None],
            needs_prompt_logprobs=False,
            request_batch_slices=[("sample", name, 0, 1, False)],
        )
        found = self.backend.sample(batch)["sample"]
        assert len(found.sequences[0].tokens) == 1, found

    def state_bytes(self) -> int:
        """Parameters and gradients of all slots, and the moments of every tenant."""
        import jax
        from flax import nnx

        trees = [self.backend.lora_params, self.backend.accumulated_grads.grad_sum]
        trees += [nnx.state(optimizer) for optimizer in self.backend.optimizers.values()]
        return sum(leaf.nbytes for tree in trees for leaf in jax.tree.leaves(tree))


def measured(job: dict[str, Any]) -> dict[str, Any]:
    """What the job asks for."""
    rival = Rival(job)
    begin, logprobs, cases = resident_bytes(), [], {}
    for tenants in job["tenants"]:
        rival.grow(tenants)
        logprobs = logprobs or rival.logprobs()
        passes, steps = timed(job["repeats"], rival.forward_backward, rival.step)
        state, resident = rival.state_bytes(), resident_bytes() - begin
        _, new, old = timed(
            job["repeats"],
            lambda: rival.step_of(0),  # without gradients the moments move the weights
            lambda: rival.sample(0, is_new=True),
            lambda: rival.sample(0, is_new=False),
        )
        cases[tenants] = {"forward_backward_s": passes, "steps_s": steps, "new_s": new, "old_s": old}
        cases[tenants] |= {"state_bytes": state, "resident_bytes": resident}
    versions = {name: version(name) for name in ("skyrl", "jax", "jaxlib", "flax", "optax", "transformers")}
    return {"versions": versions, "logprobs": logprobs, "cases": cases}


def main() -> None:
    """Read the job, do it, print what was found."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {job["core"]})  # before JAX makes its threads
    print(json.dumps(measured(job)))


if __name__ == "__main__":
    main()

"""Run by torchrun: DDP, FSDP2 and tensor parallelism of a tiny model, each stopped and resumed. Argument: a folder."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tiny_rows import mixed_rows
from tiny_training import (
    ROWS,
    STOP,
    VARIANTS,
    Trace,
    adapted,
    base_model,
    logits,
    named,
    optimizer_of,
    reference,
    save,
    train,
)
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaForCausalLM

from roadie import checkpoint
from roadie.distributed import full_adapter, joined, load_full_adapter, shard_model, tensor_parallel
from roadie.errors import RoadieError

ADAPTERS_ONLY = StateDictOptions(ignore_frozen_params=True)


def all_losses(trace: Trace) -> Trace:
    """The losses of the global batches: the mean over the processes, whose rows have the same number of tokens."""
    losses: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(losses, trace.losses)
    trace.losses = [sum(of_step) / len(of_step) for of_step in zip(*losses, strict=True)]
    return trace


def stopped_and_resumed(make: Callable[[], Any], rows: slice, folder: Path) -> tuple[Trace, Any]:
    """A model that is trained, saved, made anew with another adapter, loaded, and trained on."""
    model, trace = make(), Trace()
    optimizer = optimizer_of(model)
    train(model, optimizer, trace, last=STOP, rows=rows)
    parts = dict(zip(("adapter", "optimizer"), get_state_dict(model, optimizer, options=ADAPTERS_ONLY), strict=True))
    dcp.save(parts, checkpoint_id=folder)
    resumed = make()
    with torch.no_grad():
        for parameter in named(resumed).values():
            parameter.zero_()
    optimizer = optimizer_of(resumed)
    parts = dict(zip(("adapter", "optimizer"), get_state_dict(resumed, optimizer, options=ADAPTERS_ONLY), strict=True))
    dcp.load(parts, checkpoint_id=folder)
    set_state_dict(
        resumed,
        optimizer,
        model_state_dict=parts["adapter"],
        optim_state_dict=parts["optimizer"],
        options=StateDictOptions(ignore_frozen_params=True, strict=False),
    )
    return train(resumed, optimizer, trace, first=STOP, rows=rows), resumed


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    with joined() as together:
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("all",))
        share = ROWS // together.count
        own, every = slice(together.rank * share, (together.rank + 1) * share), slice(None)

        def ddp(variant: str) -> Any:
            return DistributedDataParallel(adapted(variant))

        def fsdp(variant: str) -> Any:
            model = adapted(variant, seed=1 + together.rank)  # made equal by replicate_adapters
            shard_model(model, mesh)
            return model

        def fsdp_half(variant: str) -> Any:
            model = adapted(variant, torch.bfloat16)
            shard_model(model, mesh)
            return model

        def tp(variant: str) -> Any:
            return tensor_parallel(adapted(variant), mesh)

        def tp_base_first(variant: str) -> Any:
            """As transformers does it with tp_plan="auto": the base is in parts before it is adapted."""
            whole_one = full_adapter(adapted(variant))
            base = LlamaForCausalLM.from_pretrained(folder / "base", tp_plan="auto", dtype=torch.float64)
            model = adapted(variant, base=base)
            tensor_parallel(model)
            load_full_adapter(model, whole_one)
            return model

        together.first(lambda: base_model().save_pretrained(folder / "base"))
        ways = {"ddp": (ddp, own), "fsdp": (fsdp, own), "tp": (tp, every), "tp_base_first": (tp_base_first, every)}
        for variant in VARIANTS:
            alone = adapted(variant)
            trace = train(alone, optimizer_of(alone), Trace())
            torch.save(logits(alone), folder / f"logits-{variant}.pt")
            save(trace, folder / f"one-{variant}-{together.rank}.pt")
            for way, (make, rows) in ways.items():
                trace, model = stopped_and_resumed(partial(make, variant), rows, folder / f"dcp-{way}-{variant}")
                save(all_losses(trace), folder / f"{way}-{variant}-{together.rank}.pt")
                adapter = full_adapter(model)
                if together.is_first:
                    checkpoint.save(adapter, folder / f"adapter-{way}-{variant}")
            save(reference(variant, torch.bfloat16), folder / f"one_half-{variant}-{together.rank}.pt")
            rounded = adapted(variant, base=base_model(torch.bfloat16).to(torch.float64))
            save(train(rounded, optimizer_of(rounded), Trace()), folder / f"truth_half-{variant}-{together.rank}.pt")
            half = fsdp_half(variant)
            assert {p.dtype for p in named(half).values()} == {torch.float32}
            trace = train(half, optimizer_of(half), Trace(), rows=own)
            save(all_losses(trace), folder / f"fsdp_half-{variant}-{together.rank}.pt")
        inputs_too(folder, together, own, mesh)
        mixed_rows(folder, together)
        refusals(folder, mesh)


def inputs_too(folder: Path, together: Any, own: slice, mesh: Any) -> None:
    """Adapters that rotate inputs too are spread as any others are."""
    make = partial(adapted, "road_2", input_stages=[8], input_stages_pattern={"down_proj": [2, 4]})

    def ddp() -> Any:
        return DistributedDataParallel(make())

    def fsdp() -> Any:
        model = make(seed=1 + together.rank)
        shard_model(model, mesh)
        return model

    alone = make()
    save(train(alone, optimizer_of(alone), Trace()), folder / f"one-inputs-{together.rank}.pt")
    for way, spread in (("ddp", ddp), ("fsdp", fsdp)):
        trace, model = stopped_and_resumed(spread, own, folder / f"dcp-{way}-inputs")
        save(all_losses(trace), folder / f"{way}-inputs-{together.rank}.pt")
        adapter = full_adapter(model)
        if together.is_first:
            checkpoint.save(adapter, folder / f"whole-{way}-inputs")
    load_full_adapter(alone, adapter)
    assert all(torch.equal(p, named(alone)[name]) for name, p in named(model).items())


def refusals(folder: Path, mesh: Any) -> None:
    """Writes what each of these says, and that nothing was changed."""
    parallel = tensor_parallel(adapted("road_1"), mesh)
    said = {}
    for name, refused in {
        "cut": lambda: tensor_parallel(adapted("road_4", group_size=16), mesh),
        "stages": lambda: tensor_parallel(adapted("road_1", group_size=64, stages=[8, 4]), mesh),
        "inputs": lambda: tensor_parallel(adapted("road_1", input_stages=[8]), mesh),
        "mesh": lambda: tensor_parallel(adapted("road_1")),
        "plan": lambda: tensor_parallel(adapted("road_1"), mesh, {"nothing.*": "colwise"}),
        "again": lambda: tensor_parallel(parallel, mesh, {"layers.*.mlp.up_proj": "colwise"}),
        "plain": lambda: tensor_parallel(base_model(), mesh),
        "merge": lambda: parallel.merge_adapter(),
        "blocks": lambda: shard_model(adapted("road_1"), mesh, blocks=["Block"]),
        "other": lambda: load_full_adapter(parallel, full_adapter(adapted("road_2"))),
        "fewer": lambda: load_full_adapter(parallel, full_adapter(adapted("road_1", target_modules=["q_proj"]))),
    }.items():
        try:
            refused()
        except RoadieError as error:
            said[name] = f"{type(error).__name__}: {error}"
    (folder / f"refused-{dist.get_rank()}.json").write_text(json.dumps(said))
    kept = adapted("road_4", group_size=16)
    before = {name: (type(p), p.clone()) for name, p in kept.named_parameters()}
    with contextlib.suppress(RoadieError):
        tensor_parallel(kept, mesh)
    assert all(type(p) is before[n][0] and torch.equal(p, before[n][1]) for n, p in kept.named_parameters())


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Run by torchrun: DeepSpeed's ZeRO-3, stopped and resumed, with adapters whole and in parts. Argument: a folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from tiny_training import (
    RATE,
    ROWS,
    STEPS,
    STOP,
    VARIANTS,
    Trace,
    adapted,
    base_model,
    batch,
    logits,
    named,
    optimizer_of,
    reference,
    save,
    train,
)

from roadie import checkpoint
from roadie.distributed import full_adapter, load_full_adapter
from roadie.errors import ConfigError

THRESHOLDS = {
    "whole": 100_000,
    "parts": 0,
}  # elements below which DeepSpeed keeps a parameter whole; the first is its default


def engine_of(model: Any, threshold: int) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": ROWS // dist.get_world_size(),
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": threshold},
        "optimizer": {"type": "AdamW", "params": {"lr": RATE, "weight_decay": 1e-2, "torch_adam": True}},
        "gradient_clipping": 1.0,
        "zero_force_ds_cpu_optimizer": False,
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return deepspeed.initialize(model=model, model_parameters=trained, config=config)[0]


def steps(engine: Any, trace: Trace, first: int, last: int) -> None:
    own = slice(dist.get_rank() * ROWS // 2, (dist.get_rank() + 1) * ROWS // 2)
    for step in range(first, last):
        ids = batch(step)[own]
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        if step == 0:
            trace.gradients = {name: safe_get_full_grad(parameter).clone() for name, parameter in named(engine).items()}
        engine.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        trace.losses.append(float(mean) / dist.get_world_size())


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    rank = dist.get_rank()
    if rank == 0:
        base_model().save_pretrained(folder / "base")
    for variant in VARIANTS:
        save(reference(variant), folder / f"truth-{variant}-{rank}.pt")
        alone = adapted(variant, torch.float32)
        save(train(alone, optimizer_of(alone), Trace()), folder / f"one-{variant}-{rank}.pt")
        torch.save(logits(alone), folder / f"logits-{variant}.pt")
        for way, threshold in THRESHOLDS.items():
            trace = Trace()
            engine = engine_of(adapted(variant, torch.float32), threshold)
            steps(engine, trace, 0, STOP)
            held = {parameter.numel() for parameter in named(engine).values()}
            assert way == "whole" or held == {0}, held
            engine.save_checkpoint(folder / f"zero-{way}-{variant}", exclude_frozen_parameters=True)
            engine = engine_of(adapted(variant, torch.float32, seed=7), threshold)
            engine.load_checkpoint(folder / f"zero-{way}-{variant}", load_module_strict=False)
            steps(engine, trace, STOP, STEPS)
            adapter = full_adapter(engine)
            for path, layer in adapter.layers.items():
                prefix = f"base_model.model.{path}"
                trace.parameters[f"{prefix}.road_theta.default"] = layer.theta
                trace.parameters[f"{prefix}.road_alpha.default"] = layer.alpha
            save(trace, folder / f"{way}-{variant}-{rank}.pt")
            if rank == 0:
                checkpoint.save(adapter, folder / f"adapter-{way}-{variant}")
            try:
                load_full_adapter(engine, adapter)
            except ConfigError as error:
                (folder / f"refused-{rank}").write_text(str(error))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

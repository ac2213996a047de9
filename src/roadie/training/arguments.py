"""What transformers' Trainer, and TRL's on top of it, are told: a recipe in their words."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import torch
from transformers import TrainingArguments

from roadie.distributed.processes import Processes
from roadie.training.corpus import Corpus
from roadie.training.models import training_dtype
from roadie.training.recipe import Recipe


def trainer_arguments(recipe: Recipe, corpus: Corpus, together: Processes) -> dict[str, Any]:
    """Keyword arguments for `TrainingArguments`, or those of TRL, which extend them; without output_dir and report_to."""
    steps_per_epoch = math.ceil(len(corpus.rows) / recipe.batch_size)
    steps = recipe.max_steps or math.ceil(recipe.epochs * steps_per_epoch)
    interval = recipe.checkpoint_steps or steps_per_epoch
    several, has_accelerator = together.count > 1, torch.accelerator.is_available()
    devices = together.count if several else max(1, torch.cuda.device_count())
    return dict(
        per_device_train_batch_size=recipe.per_device_batch_size(devices),
        per_device_eval_batch_size=recipe.per_device_batch_size(devices),
        gradient_accumulation_steps=recipe.accumulation_steps(devices),
        max_steps=steps,
        optim="adamw_torch",
        learning_rate=recipe.peak_rate,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        lr_scheduler_type="constant_with_warmup" if recipe.schedule == "constant" else recipe.schedule,
        warmup_steps=min(math.ceil(recipe.warmup_ratio * steps), steps - 1),  # a first warm-up step has a rate of 0
        bf16=training_dtype(recipe.precision) is torch.bfloat16,
        seed=recipe.seed,
        data_seed=recipe.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=interval,
        save_total_limit=2,
        eval_strategy="steps" if corpus.held_out else "no",
        eval_steps=interval,
        load_best_model_at_end=bool(corpus.held_out),
        metric_for_best_model="eval_loss" if corpus.held_out else None,
        greater_is_better=False if corpus.held_out else None,
        include_num_input_tokens_seen="non_padding",
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=has_accelerator,
        use_cpu=several and not has_accelerator,
        ddp_find_unused_parameters=several,  # experts that no token of a batch went to
        ddp_broadcast_buffers=False,
        disable_tqdm=True,
        **_recomputation(),
    )


def _recomputation() -> dict[str, bool]:
    """Off for the trainer, since the model is told itself; TRL's arguments would have it on. transformers renamed it."""
    names = {field.name for field in fields(TrainingArguments)}
    return {"activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing": False}

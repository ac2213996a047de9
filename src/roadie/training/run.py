"""Training one adapter, from texts to a folder: transformers' Trainer with the recipe of the paper.

    train(["texts.jsonl"], "my-adapter", recipe=Recipe(epochs=3))

The output folder appears whole at the end: the adapter in PEFT's format, a model card, and ``training.json``, a record
of what was done. Until then checkpoints (adapter, optimizer, random states; never the base model) are kept in
``my-adapter.training``. A run that was interrupted and resumed gives the losses and the adapter of one that was not.

Several processes, started by accelerate or torchrun, share each batch; the steps, and the adapter, are those of one
process (up to rounding). Only the first of them writes files. In one process Trainer spreads the batch over the
accelerators it sees.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from roadie.adapter import stages_of
from roadie.checkpoint import WEIGHTS_NAME
from roadie.distributed.processes import Processes, join
from roadie.engine.targets import check_any
from roadie.errors import ConfigError
from roadie.extras import need
from roadie.training.arguments import trainer_arguments
from roadie.training.checkpoints import (
    WorkFolder,
    check_output,
    former_rate,
    logged,
    open_work,
    record_start,
    saved_in,
    work_path,
)
from roadie.training.corpus import Corpus, prepare_corpus
from roadie.training.folders import whole_folder
from roadie.training.group_sizes import tell_of_smaller_groups
from roadie.training.hub import HubPlace
from roadie.training.interruption import Interrupted, StopRequest, stop_request
from roadie.training.models import (
    ModelSource,
    as_source,
    hidden_size,
    load_model,
    load_tokenizer,
    training_dtype,
)
from roadie.training.packing import check_packable
from roadie.training.progress import shown_progress
from roadie.training.rate_watch import RateWatch
from roadie.training.recipe import Recipe
from roadie.training.record import RECORD_NAME, Sources, TrainingResult, history_of, write_record
from roadie.training.reports import check_reports, kept_reports
from roadie.training.stopping import EarlyStop, step_of_end
from roadie.training.trainer import GlobalBatchTrainer
from roadie.tuner import RoadConfig, RoadInput, RoadLayer, get_peft_model, prepare_quantised, train_only
from roadie.tuner.angle_watch import stop_watching

if TYPE_CHECKING:
    from roadie.training.preference_trainer import PreferenceTrainer
    from roadie.tuner import PeftModel


def train(
    data: Sources,
    output: str | Path,
    *,
    model: str | ModelSource | None = None,
    recipe: Recipe | None = None,
    eval_data: Sources | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: bool = False,
    report_to: Sequence[str] = (),
    push_to_hub: HubPlace | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> TrainingResult:
    """Train a RoAd adapter on texts (see `roadie.training.text`) and write it to the folder `output`.

    model: folder or hub name of a causal language model; None: the embedded one. eval_data: held-out texts; with them
    (or with `Recipe.eval_share`) the adapter of the best checkpoint is kept. overwrite: replace what is in `output`;
    resume: go on with an interrupted run, or start it where there is none. report_to: integrations of transformers, such
    as "tensorboard"; push_to_hub: where the finished adapter goes too. callbacks: further ones for Trainer.
    Raises `RoadieError` for settings, texts and models that cannot be used, before anything is written.
    """
    output, asked = Path(output), recipe or Recipe()
    source, together = as_source(model), join()
    together.first(lambda: check_output(output, overwrite=overwrite, resume=resume))
    together.each(lambda: _check_surroundings(asked, report_to, together))
    corpus = together.each(lambda: prepare_corpus(data, eval_data, source, asked))
    former = together.first(lambda: former_rate(output) if resume else None)
    recipe = together.each(lambda: _with_rate(asked, former, source, len(corpus.rows)))
    if push_to_hub is not None:
        together.first(push_to_hub.prepare)
    adapted = together.each(lambda: adapted_model(source, recipe))
    settings = _settings(source, recipe, corpus)
    places = {"report_to": list(report_to), "push_to_hub": push_to_hub.repository if push_to_hub else None}
    _check_same_everywhere(together, settings)
    work = together.first(lambda: open_work(output, settings, resume=resume))
    observers = [*callbacks, *_observers(recipe, shown=progress and together.is_first)]
    loss_before = work.loss_before
    with kept_reports(report_to, output):
        trainer = _build_trainer(adapted, corpus, recipe, work, observers, together, source, report_to)
        if loss_before is None:
            loss_before = _loss(trainer)
            together.first(partial(record_start, work.path, settings, loss_before))
        with train_only(adapted, recipe.share) if recipe.share else nullcontext() as trained:
            session = _run(trainer, work, recipe)
        history = history_of(trainer)
        loss_after = _loss(trainer)

    def write() -> TrainingResult:
        with whole_folder(output, overwrite=overwrite) as folder:
            # The vocabulary is the base model's, so its layers are as they were, also where they are targets.
            adapted.save_pretrained(str(folder), save_embedding_layers=False)
            result = TrainingResult(
                output=output,
                model=source.place,
                learning_rate=recipe.peak_rate,
                loss_on=corpus.measured_name,
                loss_before=loss_before,
                loss_after=loss_after,
                best_step=trainer.state.best_global_step if corpus.held_out else None,
                train_examples=len(corpus.learnt),
                evaluation_examples=len(corpus.held_out),
                **_sizes(adapted, folder, trained),
                **session,
            )
            write_record(folder / RECORD_NAME, result, settings, history, data, eval_data, places)
        shutil.rmtree(work_path(output), ignore_errors=True)
        return result

    result = together.first(write)
    if push_to_hub is not None:
        together.first(partial(push_to_hub.push, output))
    return result


def _check_surroundings(recipe: Recipe, report_to: Sequence[str], together: Processes) -> None:
    """Raise `ConfigError` unless what the settings ask for, beside data and model, is here."""
    check_reports(report_to)
    if recipe.method != "dpo":
        return
    devices = max(together.count, torch.cuda.device_count())
    if devices > 1:
        raise ConfigError(
            f"got {devices} processes or GPUs for method='dpo'; wanted one, since TRL's batches depend on their number; start "
            "one process, and make one GPU visible (CUDA_VISIBLE_DEVICES=0)"
        )
    need("trl")


def _with_rate(asked: Recipe, former: float | None, source: ModelSource, rows: int) -> Recipe:
    """The recipe with a learning rate: the one asked for, that of the run that goes on, or that of width and data."""
    if asked.learning_rate is None and former is not None:
        return replace(asked, learning_rate=former)
    return asked.for_width(hidden_size(source), rows)


def _check_same_everywhere(together: Processes, settings: dict[str, Any]) -> None:
    """Raise `ConfigError`, in all processes, unless all of them were told, and read, the same."""
    of_all = together.gather(settings)
    differing = sorted({key for other in of_all for key in settings if other[key] != of_all[0][key]})
    if differing:
        raise ConfigError(
            f"got processes that differ in {', '.join(differing)}; wanted the same command and the same data in all; "
            "give every machine the same files"
        )


def adapted_model(source: ModelSource, recipe: Recipe) -> PeftModel:
    """The base model with a fresh adapter of the recipe, on the CPU."""
    base = load_model(source, training_dtype(recipe.precision), in_4bit=recipe.load_in_4bit)
    base.config.use_cache = False
    if recipe.load_in_4bit:
        base = prepare_quantised(base)
    if recipe.gradient_checkpointing:
        _enable_gradient_checkpointing(base)
    check_any(base, recipe.target_modules, "target_modules")
    adapted = get_peft_model(base, RoadConfig(task_type="CAUSAL_LM", **recipe.of_adapter))
    layers = (m for m in adapted.named_modules() if isinstance(m[1], RoadLayer) and not isinstance(m[1], RoadInput))
    sizes = ((path, stages_of(size)) for path, layer in layers for size in layer.group_size.values())
    tell_of_smaller_groups(sizes, recipe.stages or (recipe.group_size,))
    if recipe.packing:
        check_packable(adapted)
    stop_watching(adapted)  # `RateWatch` looks at the losses, and knows the schedule
    return adapted


def _enable_gradient_checkpointing(base: Any) -> None:
    # transformers 5 renamed the method and warns about the old name.
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable()
    base.enable_input_require_grads()


def _settings(source: ModelSource, recipe: Recipe, corpus: Corpus) -> dict[str, Any]:
    """What must be equal for two runs to be the same run; plain JSON values."""
    return {
        "model": source.place,
        "revision": source.revision,
        **recipe.to_mapping(),
        "max_length": corpus.max_length,
        **corpus.fingerprints,
    }


def _observers(recipe: Recipe, *, shown: bool) -> list[TrainerCallback]:
    stop = [] if recipe.patience is None else [EarlyStop(recipe.patience)]
    return [*stop, RateWatch(), *([shown_progress()] if shown else [])]


def _build_trainer(
    adapted: PeftModel,
    corpus: Corpus,
    recipe: Recipe,
    work: WorkFolder,
    callbacks: Sequence[TrainerCallback],
    together: Processes,
    source: ModelSource,
    report_to: Sequence[str],
) -> GlobalBatchTrainer | PreferenceTrainer:
    told = {
        **trainer_arguments(recipe, corpus, together),
        "output_dir": str(work.path),
        "report_to": list(report_to) or "none",
    }
    trainer: GlobalBatchTrainer | PreferenceTrainer
    if recipe.method == "dpo":
        trainer = _preference_trainer(adapted, corpus, recipe, callbacks, source, told)
    else:
        trainer = GlobalBatchTrainer(
            together,
            corpus.rows,
            pad_token_id=adapted.config.pad_token_id or 0,
            model=adapted,
            args=TrainingArguments(**told),
            eval_dataset=corpus.measured,
            callbacks=list(callbacks),
        )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _preference_trainer(
    adapted: PeftModel,
    corpus: Corpus,
    recipe: Recipe,
    callbacks: Sequence[TrainerCallback],
    source: ModelSource,
    told: dict[str, Any],
) -> PreferenceTrainer:
    from roadie.training.preference_trainer import PreferenceTrainer

    assert recipe.beta is not None
    try:
        return PreferenceTrainer(
            corpus.rows,
            corpus.measured,
            model=adapted,
            tokenizer=load_tokenizer(source),
            beta=recipe.beta,
            arguments=told,
            callbacks=callbacks,
        )
    except ValueError as error:
        raise ConfigError(f"got method='dpo' with settings that TRL's trainer does not take: {error}") from error


def _loss(trainer: Trainer) -> float:
    return float(trainer.evaluate()["eval_loss"])


def _run(trainer: GlobalBatchTrainer | PreferenceTrainer, work: WorkFolder, recipe: Recipe) -> dict[str, Any]:
    """Train to the end; what this session did."""
    ended = work.checkpoint and recipe.patience and step_of_end(logged(work.checkpoint), recipe.patience)
    if ended:  # interrupted between its early end and the writing of its output
        trainer.args.max_steps = ended
    begin = time.perf_counter()
    with stop_request(enabled=not trainer.is_shared) as stop:
        start = _Session(stop)
        trainer.add_callback(start)
        trainer.train(resume_from_checkpoint=str(work.checkpoint) if work.checkpoint else None)
    if stop.asked:
        raise Interrupted(saved_in(work.path))
    return {
        "steps": trainer.state.global_step,
        "resumed_from_step": start.step,
        "seconds": time.perf_counter() - begin,
        "tokens": int(trainer.state.num_input_tokens_seen)
        - start.tokens
        - trainer.filler_tokens(start.step, trainer.state.global_step),
    }


class _Session(TrainerCallback):
    """Remembers where a session started, which Trainer restores from the checkpoint; ends it, with one, where that is asked."""

    step = 0
    tokens = 0

    def __init__(self, request: StopRequest) -> None:
        self._request = request

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.step, self.tokens = state.global_step, int(state.num_input_tokens_seen)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._request.asked:
            control.should_save = control.should_training_stop = True


def _sizes(adapted: PeftModel, folder: Path, trained: int | None) -> dict[str, int]:
    trainable, total = adapted.get_nb_trainable_parameters()
    return {
        "trainable_parameters": trainable if trained is None else trained,
        "total_parameters": total,
        "adapter_bytes": (folder / WEIGHTS_NAME).stat().st_size,
    }

"""Run by torchrun: `train` in float64: whole, stopped and resumed, and refused. Arguments: base, texts, folder."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import TrainerCallback
from transformers.loss.loss_utils import LOSS_MAPPING

import roadie.training.run
from roadie.distributed import joined
from roadie.errors import RoadieError
from roadie.training.recipe import Recipe
from roadie.training.run import train

RECIPE = Recipe(
    epochs=3, batch_size=10, micro_batch_size=5, learning_rate=3e-2, group_size=16, checkpoint_steps=2, eval_share=0.2
)


def loss_in_float64(logits, labels, vocab_size, num_items_in_batch=None, **_):
    """transformers' loss of causal models, which rounds logits to float32 first."""
    logits, labels = logits[:, :-1].reshape(-1, vocab_size), labels[:, 1:].reshape(-1)
    total = torch.nn.functional.cross_entropy(logits.double(), labels, reduction="sum")
    return total / (num_items_in_batch if num_items_in_batch is not None else (labels != -100).sum())


class Gradients(TrainerCallback):
    """Writes the gradients that the first step is made with, and stops at a step."""

    def __init__(self, path: Path | None, stop: int | None = None) -> None:
        self.path, self.stop = path, stop

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        if self.path is not None and state.global_step == 0:
            names = {name.removeprefix("module."): parameter for name, parameter in model.named_parameters()}
            found = {name: parameter.grad.clone() for name, parameter in names.items() if parameter.requires_grad}
            torch.save(found, self.path)

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.stop:
            raise RoadieError("stopped")


def main(base: str, texts: str, folder: Path, recipe: Recipe = RECIPE) -> None:
    roadie.training.run.training_dtype = lambda precision: torch.float64
    LOSS_MAPPING["ForCausalLM"] = loss_in_float64
    with joined() as together:
        recorder = Gradients(folder / f"gradients-{together.rank}.pt")
        train(texts, folder / "whole", model=base, recipe=recipe, callbacks=[recorder])
        if together.count == 1:
            return
        stopping = {"model": base, "recipe": recipe, "callbacks": [Gradients(None, stop=5)]}
        try:
            train(texts, folder / "stopped", **stopping)
        except RoadieError:
            together.wait()
        assert not (folder / "stopped").exists()
        train(texts, folder / "stopped", model=base, recipe=recipe, resume=True)
        try:
            train(texts, folder / "whole", model=base, recipe=recipe)
        except RoadieError as error:
            (folder / f"refused-{together.rank}").write_text(str(error))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))

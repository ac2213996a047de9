"""transformers' Trainer, whose steps and losses do not depend on how many processes share the work.

- **Steps.** Of each global batch every process takes its part. At the end of an epoch the last batch is filled up with
  examples of which nothing is learnt, where accelerate would repeat others; the loss is the mean over the learnt tokens of
  the whole batch, and the gradient its gradient.
- **Evaluation** is the mean over all learnt tokens, whatever the batches.
- **Checkpoints.** trainer_state.json, by which a checkpoint is known to be whole, is written when all processes have
  written theirs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import Sampler
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from roadie.distributed.processes import Processes
from roadie.errors import ConfigError
from roadie.training.encoding import IGNORED, Example, collate

FILLER = Example((0, 0), (IGNORED, IGNORED))


class GlobalBatchTrainer(Trainer):
    """A Trainer over `Example`s; together: the processes that share each batch; pad_token_id: of the model."""

    def __init__(self, together: Processes, examples: list[Example], *, pad_token_id: int, **arguments: Any) -> None:
        self._together = together
        self._examples = len(examples)
        self._collate = partial(collate, pad_token_id=pad_token_id)
        several = together.count > 1
        data = [*examples, FILLER] if several else examples
        super().__init__(train_dataset=data, data_collator=self._collate, **arguments)
        if several and not self.model_accepts_loss_kwargs:
            raise ConfigError(
                f"got {together.count} processes for a model whose loss takes no num_items_in_batch; wanted one that does, "
                "since a batch's loss is the mean over its tokens in all processes; train it in one process"
            )

    @property
    def is_shared(self) -> bool:
        """Whether several processes share the work."""
        return self._together.count > 1

    @property
    def _fillers(self) -> int:
        """Examples that fill up an epoch."""
        return -self._examples % (self.args.train_batch_size * self._together.count)

    def filler_tokens(self, first_step: int, last_step: int) -> int:
        """Tokens of fillers among those counted from one step to another."""
        if self._together.count == 1:
            return 0
        steps = math.ceil((self._examples + self._fillers) / self._rows_of_a_step)
        return (last_step // steps - first_step // steps) * self._fillers * len(FILLER.input_ids)

    @property
    def _rows_of_a_step(self) -> int:
        return self.args.train_batch_size * self._together.count * self.args.gradient_accumulation_steps

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self._together.count == 1:
            return super()._get_train_sampler(train_dataset)
        return _FilledUp(self._examples, self._fillers, self.args.data_seed)

    def evaluation_loop(self, dataloader: Any, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> EvalLoopOutput:
        """The mean loss over the learnt tokens of all examples, each of which is seen by one process."""
        examples: list[Example] = dataloader.dataset
        own = examples[self._together.rank :: self._together.count]
        parts = self._together.gather(self._sum_of_losses(own))
        loss = sum(part[0] for part in parts) / sum(part[1] for part in parts)
        return EvalLoopOutput(None, None, {f"{metric_key_prefix}_loss": loss}, len(examples))

    def _sum_of_losses(self, examples: list[Example]) -> tuple[float, int]:
        """The losses of all learnt tokens, and how many these are."""
        size, total, count = self.args.per_device_eval_batch_size, 0.0, 0
        was_training = self.model.training
        self.model.eval()
        for start in range(0, len(examples), size):
            inputs = self._prepare_inputs(self._collate(examples[start : start + size]))
            learnt = int((inputs["labels"][:, 1:] != IGNORED).sum())
            with torch.no_grad(), self.accelerator.autocast():
                total += float(self.model(**inputs).loss) * learnt
            count += learnt
        self.model.train(was_training)
        return total, count

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Rows that hold several examples without a mask and a cache: else transformers does not keep them apart.

        Padding needs no mask, since it comes after all that is learnt; until here the mask is what tokens are counted by.
        """
        prepared: dict[str, Any] = super()._prepare_inputs(inputs)
        if "position_ids" in prepared:
            prepared.pop("attention_mask")
            prepared["use_cache"] = False
        return prepared

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self._together.wait()


class _FilledUp(Sampler[int]):
    """The order of one process, as accelerate draws it, and then fillers (at the place after the last example)."""

    def __init__(self, examples: int, fillers: int, seed: int) -> None:
        self._order = SeedableRandomSampler(range(examples), data_seed=seed)
        self._examples, self._count = examples, fillers

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of this epoch."""
        self._order.set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        yield from self._order
        yield from [self._examples] * self._count

    def __len__(self) -> int:
        return self._examples + self._count

"""TRL's DPOTrainer over pairs that are tokens already; one process, one device.

The reference is the base model: the adapter starts as the identity and is disabled for the reference, so that the first
loss is ln 2. Losses are means over pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from transformers.trainer_utils import EvalLoopOutput
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from roadie.training.preferences import Pair


class PreferenceTrainer(DPOTrainer):
    """A DPOTrainer over `Pair`s. arguments: as for DPOConfig; beta: of DPO."""

    is_shared = False
    """Whether several processes share the work: they are refused."""

    def __init__(
        self,
        pairs: Sequence[Pair],
        measured: Sequence[Pair],
        *,
        model: Any,
        tokenizer: Any,
        beta: float,
        arguments: dict[str, Any],
        callbacks: Sequence[Any],
    ) -> None:
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        super().__init__(
            model=model,
            args=DPOConfig(**arguments, beta=beta, max_length=None),
            train_dataset=_rows(pairs),
            eval_dataset=_rows(measured),
            data_collator=DataCollatorForPreference(pad_token_id=model.config.pad_token_id or 0),
            processing_class=tokenizer,
            callbacks=list(callbacks),
        )
        # TRL makes a copy of the adapter to refer to. A fresh one is the identity, which is the base model without adapters.
        if "ref" in model.peft_config:
            model.delete_adapter("ref")
        # TRL keeps the adapter of a quantised model in bfloat16, where a step of a rotation near 1 rounds to nothing.
        for parameter in trainable:
            parameter.data = parameter.data.float()

    def filler_tokens(self, first_step: int, last_step: int) -> int:
        """Tokens that were only to fill up batches: none."""
        return 0

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """None in checkpoints; the finished adapter gets PEFT's."""

    def evaluation_loop(self, dataloader: Any, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> EvalLoopOutput:
        """The mean loss over all pairs, whatever the batches."""
        self.model.eval()
        total, count = 0.0, 0
        for batch in dataloader:
            inputs = self._prepare_inputs(batch)
            pairs = len(inputs["input_ids"]) // 2
            with torch.no_grad(), self.compute_loss_context_manager():
                total += float(self.compute_loss(self.model, inputs)) * pairs
            count += pairs
        return EvalLoopOutput(None, None, {f"{metric_key_prefix}_loss": total / count}, count)


def _rows(pairs: Sequence[Pair]) -> Dataset:
    columns = {"prompt_ids": "prompt", "chosen_ids": "chosen", "rejected_ids": "rejected"}
    return Dataset.from_dict({name: [list(getattr(pair, own)) for pair in pairs] for name, own in columns.items()})

"""The whole of RoAd in about a minute: three adapters trained on real text, measured, merged, and mixed in one batch.

    train      one adapter for each kind of text that the embedded model never saw (`roadie.embedded.corpus`)
    measure    held-out loss of the base and of every adapter on every kind: each adapter must win on its own kind
    merge      logits before a merge, while merged, and after the unmerge
    mix        one batch in which each row goes through its own adapter, or through none, from the same prompts

So few steps like a learning rate of 2e-2, higher than that of `roadie train` for a model of this width (docs/recipe.md).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, get_linear_schedule_with_warmup

from roadie import embedded
from roadie.errors import RoadieError
from roadie.training.encoding import tokens_of
from roadie.training.folders import check_writable
from roadie.training.generation import Decoding, continued
from roadie.training.prompts import BASE as BASE_ROW
from roadie.tuner import RoadConfig, get_peft_model

BASE = "base"


@dataclass(frozen=True)
class DemoSettings:
    """How much to train and to measure; lengths in tokens, `<s>` included."""

    steps: int = 50
    rows: int = 8
    row_tokens: int = 128
    learning_rate: float = 2e-2
    variant: str = "road_2"
    measured_rows: int = 32
    prompts: tuple[str, ...] = ("The ", "    def ")
    new_tokens: int = 48
    repetition_penalty: float = 1.2
    seed: int = 0


FULL = DemoSettings()
QUICK = DemoSettings(steps=30, rows=6, row_tokens=128, measured_rows=16, new_tokens=8)
"""Settings for a test: seconds, not a minute; each adapter already wins on its own kind."""


@dataclass(frozen=True)
class Continuation:
    """One row of the mixed batch: the adapter it went through (or `BASE`), its prompt, and the text that followed."""

    adapter: str
    prompt: str
    text: str


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured: losses are means per token in nats, differences the largest absolute ones between logits."""

    kinds: tuple[str, ...]
    base_parameters: int
    trainable_parameters: int
    adapter_bytes: int
    losses: Mapping[str, Mapping[str, float]]
    """`losses[adapter][kind]`, with `BASE` among the adapters."""
    merged_difference: float
    unmerged_difference: float
    mixed_difference: float
    continuations: tuple[Continuation, ...]
    seconds: float
    saved_to: Path | None

    @property
    def trainable_share(self) -> float:
        """Trainable parameters of one adapter over the parameters of the base model."""
        return self.trainable_parameters / self.base_parameters

    @property
    def winners(self) -> dict[str, str]:
        """For every kind the adapter (or `BASE`) with the lowest held-out loss."""
        return {kind: min(self.losses, key=lambda adapter: self.losses[adapter][kind]) for kind in self.kinds}

    @property
    def diagonal_wins(self) -> bool:
        """Whether every adapter is the best on its own kind."""
        return all(kind == winner for kind, winner in self.winners.items())


def run_demo(
    settings: DemoSettings = DemoSettings(),
    output: Path | None = None,
    on_step: Callable[[str, int, float], None] = lambda kind, step, loss: None,
) -> DemoResult:
    """Train, measure, merge and mix as the module says; the same settings give the same result on the same machine.

    `output`: a directory for the adapters, one directory each; `on_step(kind, step, loss)` is called after every step.
    Raises RoadieError where the standard library's text is not installed for three kinds.
    """
    started = time.monotonic()
    torch.manual_seed(settings.seed)
    kinds = installed_kinds()
    if output is not None:
        check_writable(output / kinds[0])
    tokenizer = embedded.load_tokenizer()
    model = embedded.load_model()
    base_parameters = model.num_parameters()
    model = attach_adapters(model, kinds, settings)
    trainable_parameters, _ = model.get_nb_trainable_parameters()
    for kind in kinds:
        train_adapter(model, kind, tokenizer, settings, on_step)
    model.eval()
    merged_difference, unmerged_difference = merge_differences(model, tokenizer, kinds, settings)
    return DemoResult(
        kinds=kinds,
        base_parameters=base_parameters,
        trainable_parameters=trainable_parameters,
        adapter_bytes=save_adapters(model, kinds, output),
        losses=held_out_losses(model, tokenizer, kinds, settings),
        merged_difference=merged_difference,
        unmerged_difference=unmerged_difference,
        mixed_difference=mixed_difference(model, tokenizer, kinds, settings),
        continuations=continue_prompts(model, tokenizer, kinds, settings),
        seconds=time.monotonic() - started,
        saved_to=output,
    )


def installed_kinds() -> tuple[str, ...]:
    try:
        return embedded.corpus.kinds()
    except LookupError as error:
        raise RoadieError(f"the demo needs real text: {error}") from None


def attach_adapters(model: Any, kinds: Sequence[str], settings: DemoSettings) -> Any:
    """`model` with one identity adapter for each kind on every linear layer, the first of them active."""
    first, *others = kinds
    config = RoadConfig(variant=settings.variant, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config, adapter_name=first)
    for kind in others:
        model.add_adapter(kind, replace(config))
    return model


def train_adapter(
    model: Any,
    kind: str,
    tokenizer: PreTrainedTokenizerBase,
    settings: DemoSettings,
    on_step: Callable[[str, int, float], None],
) -> None:
    """Train the adapter `kind` on the train documents of its kind: AdamW, linear schedule, a tenth of it warm-up."""
    model.set_adapter(kind)
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, settings.steps // 10, settings.steps)
    generator = torch.Generator().manual_seed(settings.seed)
    tokens = encode(tokenizer, embedded.corpus.split(kind).train)
    for step in range(1, settings.steps + 1):
        starts = torch.randint(len(tokens) - settings.row_tokens, (settings.rows,), generator=generator)
        batch = rows_at(tokens, starts, settings.row_tokens, tokenizer.bos_token_id)
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        on_step(kind, step, loss.item())


def encode(tokenizer: PreTrainedTokenizerBase, documents: Sequence[embedded.corpus.Document]) -> Tensor:
    """The tokens of all documents in one row [tokens], int64, `</s>` after each document."""
    encoded = tokenizer([document.text for document in documents], add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor([token for row in encoded for token in (*row, tokenizer.eos_token_id)])


def rows_at(tokens: Tensor, starts: Tensor, length: int, bos: int) -> Tensor:
    """Rows [starts, length]: `bos`, then the tokens from each start on."""
    windows = tokens[starts[:, None] + torch.arange(length - 1)]
    return torch.cat([windows.new_full((len(starts), 1), bos), windows], dim=1)


def held_out_rows(tokenizer: PreTrainedTokenizerBase, kind: str, settings: DemoSettings) -> Tensor:
    """Rows [measured_rows, row_tokens] spread evenly over the held-out documents of `kind`."""
    tokens = encode(tokenizer, embedded.corpus.split(kind).held_out)
    starts = torch.linspace(0, len(tokens) - settings.row_tokens, settings.measured_rows).long()
    return rows_at(tokens, starts, settings.row_tokens, tokenizer.bos_token_id)


@torch.no_grad()
def held_out_losses(
    model: Any, tokenizer: PreTrainedTokenizerBase, kinds: Sequence[str], settings: DemoSettings
) -> dict[str, dict[str, float]]:
    """`losses[adapter][kind]`: mean loss per token in nats, for the base model and for every adapter."""
    measured = {kind: held_out_rows(tokenizer, kind, settings) for kind in kinds}
    with model.disable_adapter():
        losses = {BASE: {kind: mean_loss(model, rows) for kind, rows in measured.items()}}
    for adapter in kinds:
        model.set_adapter(adapter)
        losses[adapter] = {kind: mean_loss(model, rows) for kind, rows in measured.items()}
    return losses


def mean_loss(model: Any, rows: Tensor) -> float:
    parts = [model(input_ids=part, labels=part).loss.item() * len(part) for part in rows.split(8)]
    return sum(parts) / len(rows)


@torch.no_grad()
def merge_differences(
    model: Any, tokenizer: PreTrainedTokenizerBase, kinds: Sequence[str], settings: DemoSettings
) -> tuple[float, float]:
    """Largest difference of logits from the unmerged ones over all adapters: while merged, and after the unmerge."""
    merged, unmerged = 0.0, 0.0
    for kind in kinds:
        model.set_adapter(kind)
        rows = held_out_rows(tokenizer, kind, settings)[:2]
        expected = model(input_ids=rows).logits
        model.merge_adapter(adapter_names=[kind])
        merged = max(merged, difference(model(input_ids=rows).logits, expected))
        model.unmerge_adapter()
        unmerged = max(unmerged, difference(model(input_ids=rows).logits, expected))
    return merged, unmerged


@torch.no_grad()
def mixed_difference(
    model: Any, tokenizer: PreTrainedTokenizerBase, kinds: Sequence[str], settings: DemoSettings
) -> float:
    """Largest difference between the logits of a mixed batch and those of its rows run one adapter at a time."""
    rows = torch.cat([held_out_rows(tokenizer, kind, settings)[:1] for kind in kinds])
    mixed = model(input_ids=rows, adapter_names=list(kinds)).logits
    largest = 0.0
    for row, kind in enumerate(kinds):
        model.set_adapter(kind)
        largest = max(largest, difference(model(input_ids=rows[row : row + 1]).logits, mixed[row : row + 1]))
    return largest


def difference(actual: Tensor, expected: Tensor) -> float:
    return (actual - expected).abs().max().item()


def continue_prompts(
    model: Any, tokenizer: PreTrainedTokenizerBase, kinds: Sequence[str], settings: DemoSettings
) -> tuple[Continuation, ...]:
    """One call of `generate` on one batch: every prompt once for the base model and once for every adapter."""
    adapters = [BASE_ROW, *kinds] * len(settings.prompts)
    prompts = [prompt for prompt in settings.prompts for _ in (BASE_ROW, *kinds)]
    rows = [tokens_of(tokenizer, prompt) for prompt in prompts]
    how = {"adapter_names": adapters, "repetition_penalty": settings.repetition_penalty}
    generated = continued(model, tokenizer, rows, Decoding(max_new_tokens=settings.new_tokens), **how)
    texts = tokenizer.batch_decode(generated, skip_special_tokens=True)
    names = [BASE if adapter == BASE_ROW else adapter for adapter in adapters]
    return tuple(Continuation(*row) for row in zip(names, prompts, texts, strict=True))


def save_adapters(model: Any, kinds: Sequence[str], output: Path | None) -> int:
    """Write the adapters below `output` (nowhere lasting without it) and return the bytes of one adapter file."""
    if output is None:
        with tempfile.TemporaryDirectory() as temporary:
            return save_adapters(model, kinds, Path(temporary))
    model.save_pretrained(output, selected_adapters=list(kinds))
    return (output / kinds[0] / "adapter_model.safetensors").stat().st_size

"""Train the embedded model: a byte-level BPE tokenizer and a tiny Llama, on the text of the Python standard library.

    nice -n 10 python scripts/pretrain_embedded.py                       about half an hour on two cores
    python scripts/pretrain_embedded.py --steps 20 --output /tmp/tiny    a short try

The text is `roadie.embedded.corpus.pretraining()` of the interpreter that runs this script; the kinds it holds out are
only measured. Every row of a batch is `<s>` followed by a window of the documents, which are joined by `</s>`; so text
after `<s>` may start anywhere. Matrices are trained with Muon (Jordan et al. 2024: momentum, then the nearest orthogonal
matrix), embeddings, head and norms with AdamW; both rates fall linearly to zero. The same seed, versions, machine and
number of threads give the same model.
Checkpoints are whole models, so stopping early leaves something that loads.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from roadie import embedded
from roadie.embedded import corpus

VOCABULARY = 2048
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
CONTEXT = 512
BATCH_TOKENS = 4096
MUON_RATE, MUON_MOMENTUM = 0.02, 0.95
ADAMW_RATE = 3e-3


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that puts `<s>` before a text, as Llama's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos = SPECIAL["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        **SPECIAL,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of 4.3 million parameters in which the outputs of every linear layer are a multiple of 64."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, documents: Iterable[corpus.Document]) -> Tensor:
    """All tokens of the documents in one row [tokens], int64, `</s>` after each document."""
    encoded = tokenizer([document.text for document in documents], add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor([token for row in encoded for token in (*row, tokenizer.eos_token_id)])


def rows(tokens: Tensor, length: int, bos: int, offset: int = 0) -> Tensor:
    """`tokens` from `offset` on as rows [rows, length] that each begin with `bos`."""
    windows = tokens[offset:].unfold(0, length - 1, length - 1)
    return torch.cat([windows.new_full((len(windows), 1), bos), windows], dim=1)


def batches(tokens: Tensor, bos: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """`steps` batches of `BATCH_TOKENS` tokens, shuffled anew in every epoch; the last fifth in rows of the full context."""
    order: list[Tensor] = []
    long_from = int(0.8 * steps)
    for step in range(steps):
        length = CONTEXT if step >= long_from else CONTEXT // 2
        if not order or step == long_from:
            offset = int(torch.randint(length, (), generator=generator))
            epoch = rows(tokens, length, bos, offset)
            shuffled = epoch[torch.randperm(len(epoch), generator=generator)]
            order = [batch for batch in shuffled.split(BATCH_TOKENS // length) if len(batch) == BATCH_TOKENS // length]
        yield order.pop()


class Muon(torch.optim.Optimizer):
    """Momentum whose step is replaced by (nearly) the nearest matrix with orthonormal rows or columns."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                momentum.lerp_(weight.grad, 1 - MUON_MOMENTUM)
                step = orthogonal(weight.grad.lerp(momentum, MUON_MOMENTUM))
                weight.add_(step, alpha=-group["lr"] * math.sqrt(max(1.0, weight.shape[0] / weight.shape[1])))


def orthogonal(matrix: Tensor) -> Tensor:
    """U V^T of the decomposition U S V^T of `matrix`, roughly: Newton and Schulz's iteration with Jordan's coefficients."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide / (wide.norm() + 1e-7)
    for _ in range(5):
        gram = wide @ wide.T
        wide = 3.4445 * wide + (-4.7750 * gram + 2.0315 * gram @ gram) @ wide
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T


def build_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or ".layers." not in name]
    return [Muon(matrices, lr=MUON_RATE), torch.optim.AdamW(others, lr=ADAMW_RATE, betas=(0.9, 0.95), weight_decay=0.0)]


def set_rates(optimizers: Iterable[torch.optim.Optimizer], progress: float) -> None:
    """A warm-up over the first hundredth, full rate up to three tenths, then a straight line to zero."""
    factor = min(1.0, (progress + 1e-3) / 0.01, (1 - progress) / 0.7)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * group.setdefault("full_lr", group["lr"])


@torch.no_grad()
def held_out_losses(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, max_rows: int) -> dict[str, float]:
    """Mean loss per token in nats, on rows of 256 tokens, of the held-out documents of every kind that is installed."""
    losses = {}
    for kind in corpus.KINDS:
        try:
            documents = corpus.split(kind).held_out
        except LookupError:
            continue
        measured = rows(encode(tokenizer, documents), CONTEXT // 2, tokenizer.bos_token_id)[:max_rows]
        parts = [(model(input_ids=part, labels=part).loss.item(), len(part)) for part in measured.split(16)]
        losses[kind] = round(sum(loss * count for loss, count in parts) / len(measured), 4)
    return losses


def train_step(model: nn.Module, optimizers: Iterable[torch.optim.Optimizer], batch: Tensor) -> float:
    loss = model(input_ids=batch, labels=batch, use_cache=False).loss
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path, record: dict[str, object]) -> None:
    """Model, tokenizer and `pretraining.json` (how it was made and what it reached) in the directory `output`."""
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    readable_by_transformers_4(output / "tokenizer_config.json")
    (output / "model.safetensors").chmod(0o644)
    (output / "pretraining.json").write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")


def readable_by_transformers_4(path: Path) -> None:
    """Name the tokenizer's class as both transformers 4 and 5 know it."""
    settings = json.loads(path.read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def main() -> None:
    options = parse_options()
    torch.manual_seed(options.seed)
    documents = corpus.pretraining()
    tokenizer = train_tokenizer(document.text for document in documents)
    tokens = encode(tokenizer, documents)
    model = build_model(tokenizer)
    optimizers = build_optimizers(model)
    print(f"{len(documents)} documents, {len(tokens):,} tokens, {model.num_parameters():,} parameters", flush=True)
    record: dict[str, object] = {
        "documents": len(documents),
        "tokens": len(tokens),
        "seed": options.seed,
        "batch_tokens": BATCH_TOKENS,
    }
    started, average = time.monotonic(), math.log(VOCABULARY)
    generator = torch.Generator().manual_seed(options.seed)
    for step, batch in enumerate(batches(tokens, tokenizer.bos_token_id, options.steps, generator), start=1):
        set_rates(optimizers, (step - 1) / options.steps)
        average += 0.05 * (train_step(model, optimizers, batch) - average)
        if step % 20 == 0:
            print(f"step {step}: loss {average:.3f}, {time.monotonic() - started:.0f} s", flush=True)
        if step % options.checkpoint_every == 0 or step == options.steps:
            losses = held_out_losses(model, tokenizer, max_rows=10_000 if step == options.steps else 32)
            print(f"step {step}: held out {losses}", flush=True)
            save(
                model,
                tokenizer,
                options.output,
                record | {"step": step, "training_loss": round(average, 4), "held_out_loss": losses},
            )


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=embedded.model_path())
    parser.add_argument("--steps", type=int, default=1300, help="batches of 4096 tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint-every", type=int, default=200, metavar="STEPS")
    return parser.parse_args()


if __name__ == "__main__":
    main()

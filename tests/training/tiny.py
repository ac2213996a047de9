"""A Llama of 0.1 million random parameters and a tokenizer of bytes, made in a moment."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from roadie.testing.accuracy import two_orders

SPECIAL = ("<s>", "</s>", "<pad>")
CHAT_TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    raw = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(vocabulary)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def model(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    settings = {
        "vocab_size": 256 + len(SPECIAL),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()


def of_losses(num_tokens: int) -> float:
    """How far apart, relative to their size, losses over so many tokens may be where sums are taken in another order.

    A loss ends a chain of sums: in each of two layers over 64 inputs, as many tokens, 64, 64 and 128 inputs, then over 64 of the
    head, 259 tokens of the vocabulary, and the tokens. After steps it holds as well: where a gradient is nearly 0 AdamW may step
    otherwise, but there the loss does not move either.
    """
    return two_orders(2 * (64 + num_tokens + 64 + 64 + 128) + 64 + 259 + num_tokens, torch.float32)


def build(folder: Path, dtype: torch.dtype = torch.float32, **changes: object) -> Path:
    """Save model and tokenizer into `folder`, as a hub repository would have them."""
    model(**changes).to(dtype).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder

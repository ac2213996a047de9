"""What each adapter answers, computed without a server: the model and a bank, one token at a time."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from roadie import checkpoint, embedded
from roadie.bank import AdapterBank

# Two float32 computations of a logit of this model differ by about 1e-5, whatever else is in the batch.
CLEAR = 1e-3
PROMPTS = ("The turtle", "import asyncio", "for item in", "def start(self):")


@cache
def greedy(adapter: Path | None, prompt: str, num_tokens: int) -> str:
    """The greedy continuation; no token of it is near a tie, so that every right computation gives the same text."""
    model, tokenizer = embedded.load_model(), embedded.load_tokenizer()
    bank = AdapterBank(model, 1)
    try:
        if adapter is not None:
            bank.admit("it", checkpoint.load(adapter))
        ids = tokenizer(prompt)["input_ids"]
        length = len(ids)
        for _ in range(num_tokens):
            with torch.no_grad(), bank.rows([None if adapter is None else "it"]):
                first, second = model(torch.tensor([ids])).logits[0, -1].topk(2)
            best, gap = int(second[0]), float(first[0] - first[1])
            assert gap > CLEAR, (adapter, prompt, gap)
            ids = [*ids, best]
    finally:
        bank.close()
    return tokenizer.decode(ids[length:])

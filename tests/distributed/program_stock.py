"""Stock PEFT, in a process that knows nothing of roadie: loads adapters, writes their logits. Argument: a folder."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.road import RoadModel
from transformers import LlamaForCausalLM

folder = Path(sys.argv[1])
for path in sorted(folder.glob("adapter-*")):
    base = LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.float64)
    model = PeftModel.from_pretrained(base, path).eval()
    assert type(model.base_model) is RoadModel
    generator = torch.Generator().manual_seed(199)
    ids = torch.randint(64, (4, 12), generator=generator)
    with torch.no_grad():
        torch.save(model(ids).logits.float(), folder / f"stock-{path.name}.pt")
assert "roadie" not in sys.modules

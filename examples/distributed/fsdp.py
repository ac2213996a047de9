"""FSDP2: the base in shards, the adapter whole: torchrun --nproc-per-node 2 examples/distributed/fsdp.py

Goes on where a former call has stopped: the checkpoint has the adapter and the optimizer, and any number of processes reads it.
"""

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

import roadie
from roadie.distributed import full_adapter, joined, shard_model

CHECKPOINT, STEPS = Path("fsdp-checkpoint"), 10

with joined() as together:
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    base, tokenizer = roadie.embedded.load_model().to(torch.bfloat16), roadie.embedded.load_tokenizer()
    config = roadie.RoadConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    model = roadie.get_peft_model(base, config).to(device)  # the base in bfloat16, the adapter in float32
    shard_model(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    options = StateDictOptions(ignore_frozen_params=True, strict=False)
    state = dict(zip(("adapter", "optimizer"), get_state_dict(model, optimizer, options=options), strict=True))
    first = 0
    if CHECKPOINT.exists():
        state["step"] = torch.tensor(0)
        dcp.load(state, checkpoint_id=CHECKPOINT)
        set_state_dict(
            model, optimizer, model_state_dict=state["adapter"], optim_state_dict=state["optimizer"], options=options
        )
        first = int(state["step"])

    text = "\n".join(document.text for document in roadie.embedded.corpus.split("topics").train[:40])
    tokens = torch.tensor(tokenizer(text)["input_ids"][: 16 * 64])
    rows = tokens.view(16, 64)[together.rank :: together.count]  # each process has its own
    for step in range(first, first + STEPS):
        ids = rows[torch.arange(4 * step, 4 * step + 4) % len(rows)].to(device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()  # the adapter's gradients are averaged over the processes here
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    state = dict(zip(("adapter", "optimizer"), get_state_dict(model, optimizer, options=options), strict=True))
    dcp.save({**state, "step": torch.tensor(first + STEPS)}, checkpoint_id=CHECKPOINT)
    adapter = full_adapter(model)  # in all processes
    if together.is_first:
        roadie.checkpoint.save(adapter, "fsdp-adapter")
        print(f"steps {first} to {first + STEPS}, loss {loss.item():.3f}")

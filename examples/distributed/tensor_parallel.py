"""Tensor parallelism: a part of every layer in each process: torchrun --nproc-per-node 2 examples/distributed/tensor_parallel.py

The base is cut when it is loaded, by transformers' tp_plan="auto"; for a base that is whole, give tensor_parallel a mesh.
"""

import torch
from transformers import AutoModelForCausalLM

import roadie
from roadie.distributed import full_adapter, joined, tensor_parallel

with joined() as together:
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    base = AutoModelForCausalLM.from_pretrained(roadie.embedded.model_path(), tp_plan="auto")
    tokenizer = roadie.embedded.load_tokenizer()
    config = roadie.RoadConfig(task_type="CAUSAL_LM", target_modules="all-linear", group_size=32)
    model = tensor_parallel(roadie.get_peft_model(base, config))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    text = "\n".join(document.text for document in roadie.embedded.corpus.split("topics").train[:40])
    ids = torch.tensor(tokenizer(text)["input_ids"][:512]).view(8, 64).to(device)  # the same rows in all processes
    for _ in range(10):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
    adapter = full_adapter(model)  # in all processes
    if together.is_first:
        roadie.checkpoint.save(adapter, "tensor-parallel-adapter")
        print(f"loss {loss.item():.3f}")

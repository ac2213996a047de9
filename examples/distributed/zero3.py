"""DeepSpeed's ZeRO-3 (pip install "roadie[distributed]"): torchrun --nproc-per-node 2 examples/distributed/zero3.py"""

import deepspeed
import torch

import roadie
from roadie.distributed import full_adapter, joined

CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "zero_optimization": {"stage": 3},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    "gradient_clipping": 1.0,
}

with joined() as together:
    config = roadie.RoadConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    model = roadie.get_peft_model(roadie.embedded.load_model(), config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=CONFIG)
    text = "\n".join(document.text for document in roadie.embedded.corpus.split("topics").train[:40])
    tokens = torch.tensor(roadie.embedded.load_tokenizer()(text)["input_ids"][: 8 * 64])
    ids = tokens.view(8, 64)[together.rank :: together.count].to(engine.device)  # each process has its own rows
    for _ in range(10):
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
    engine.save_checkpoint("zero3-checkpoint", exclude_frozen_parameters=True)
    adapter = full_adapter(engine)  # in all processes
    if together.is_first:
        roadie.checkpoint.save(adapter, "zero3-adapter")
        print(f"loss {loss.item():.3f}")

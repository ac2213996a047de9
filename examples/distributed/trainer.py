"""transformers' Trainer on several processes (DDP): torchrun --nproc-per-node 2 examples/distributed/trainer.py"""

import torch
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

import roadie

model, tokenizer = roadie.embedded.load_model(), roadie.embedded.load_tokenizer()
texts = [document.text for document in roadie.embedded.corpus.split(roadie.embedded.corpus.kinds()[0]).train[:64]]
examples = [{"input_ids": tokens} for tokens in tokenizer(texts, truncation=True, max_length=64)["input_ids"]]

model = roadie.get_peft_model(model, roadie.RoadConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
arguments = TrainingArguments(
    "trainer-output",
    learning_rate=1e-2,
    max_steps=10,
    per_device_train_batch_size=4,  # of each process
    ddp_find_unused_parameters=False,  # every adapter takes part in every step; True for experts, and for adapter_names
    use_cpu=not torch.accelerator.is_available(),
    report_to="none",
)
collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
trainer = Trainer(model, arguments, train_dataset=examples, data_collator=collator)
result = trainer.train()
if trainer.is_world_process_zero():  # one process writes
    model.save_pretrained("trainer-output/adapter")
    print(f"loss {result.training_loss:.3f} on {trainer.args.world_size} processes")

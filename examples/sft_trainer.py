"""TRL's SFTTrainer makes the adapted model itself, from `peft_config`. Needs: pip install "roadie[trl]"."""

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import roadie

model, tokenizer = roadie.embedded.load_model(), roadie.embedded.load_tokenizer()
questions = [{"prompt": f"{a} + {b} =", "completion": f" {a + b}\n"} for a in range(12) for b in range(12)]

config = roadie.RoadConfig(task_type="CAUSAL_LM", target_modules="all-linear")
arguments = SFTConfig(
    "sft-output", learning_rate=1e-2, max_steps=20, logging_steps=5, max_length=64, bf16=False, report_to="none"
)
trainer = SFTTrainer(
    model, arguments, train_dataset=Dataset.from_list(questions), processing_class=tokenizer, peft_config=config
)
trainer.train()
trainer.model.save_pretrained("sft-output/adapter")

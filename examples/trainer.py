"""transformers' Trainer on an adapted model: to Trainer it is an ordinary PEFT model."""

from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

import roadie

model, tokenizer = roadie.embedded.load_model(), roadie.embedded.load_tokenizer()
texts = [document.text for document in roadie.embedded.corpus.split(roadie.embedded.corpus.kinds()[0]).train[:64]]
examples = [{"input_ids": tokens} for tokens in tokenizer(texts, truncation=True, max_length=64)["input_ids"]]

config = roadie.RoadConfig(task_type="CAUSAL_LM", target_modules="all-linear")
model = roadie.get_peft_model(model, config)
# The paper's learning rate is 3e-3; a model as small as this one learns faster with more.
arguments = TrainingArguments("trainer-output", learning_rate=1e-2, max_steps=20, logging_steps=5, report_to="none")
collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
trainer = Trainer(model, arguments, train_dataset=examples, data_collator=collator)
trainer.train()
model.save_pretrained("trainer-output/adapter")
model.print_trainable_parameters()

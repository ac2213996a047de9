"""One batch, a different adapter for each row: one gather and one rotation a layer, however many adapters there are."""

import torch

import roadie

model, tokenizer = roadie.embedded.load_model(), roadie.embedded.load_tokenizer()
config = roadie.RoadConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_weights=False)
torch.manual_seed(0)  # init_weights=False: random adapters, in the place of trained ones
model = roadie.get_peft_model(model, config, adapter_name="french")
model.add_adapter("polite", config)
model.eval()

rows = ["french", "polite", "__base__"]
batch = tokenizer(["import ", "def main(", "class Tree:"], return_tensors="pt", padding=True)
output = model.generate(**batch, adapter_names=rows, max_new_tokens=12, do_sample=False)
for name, text in zip(rows, tokenizer.batch_decode(output, skip_special_tokens=True), strict=True):
    print(f"{name:>8}  {text!r}")

"""An adapter merged into the weights: the same outputs, and a plain model that transformers loads without roadie."""

import torch
from transformers import AutoModelForCausalLM

import roadie

model, tokenizer = roadie.embedded.load_model(), roadie.embedded.load_tokenizer()
config = roadie.RoadConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_weights=False)
torch.manual_seed(0)  # init_weights=False: a random adapter, in the place of a trained one
adapted = roadie.get_peft_model(model, config).eval()

batch = tokenizer(["def main("], return_tensors="pt")
with torch.no_grad():
    before = adapted(**batch).logits
    adapted.merge_and_unload(safe_merge=True).save_pretrained("merged")
    after = AutoModelForCausalLM.from_pretrained("merged")(**batch).logits
print(f"largest difference of a logit: {(before - after).abs().max():.1e}, of {before.abs().max():.1f}")

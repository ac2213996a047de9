"""Reinforcement learning with Tinker's SDK alone: an adapter learns to go on without the letter e.

    pip install ".[train-service]"
    roadie api-key me --prefix tml- --file keys.yaml                                 # prints the key
    roadie serve --train --train-state state --api-keys keys.yaml
    TINKER_BASE_URL=http://127.0.0.1:8000 TINKER_API_KEY=tml-... python examples/train_service/tinker_lipogram.py

The reward of a text can be checked, and nothing else is given: 1 without an e, else 0. Each text is compared with the others of
its prompt.
"""

import sys

import tinker

PROMPTS = ["The turtle", "In this chapter", "A function", "You can", "The first", "If you want"]
SAMPLES, NEW_TOKENS, STEPS = 12, 8, 18


def rows(prompt, group, decode):
    """What each sample is worth beside its group, as rows for the loss; and the mean reward."""
    worth = [float("e" not in decode(each.tokens).lower()) for each in group.sequences]
    mean, found = sum(worth) / len(worth), []
    for reward, each in zip(worth, group.sequences, strict=True):
        tokens, unseen = [*prompt, *each.tokens], [0.0] * (len(prompt) - 1)
        inputs = {
            "target_tokens": tokens[1:],
            "logprobs": [*unseen, *each.logprobs],
            "advantages": [*unseen, *[reward - mean] * len(each.tokens)],
        }
        found.append(tinker.Datum(model_input=tinker.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs))
    return found, mean


def main(seed=0):
    """The mean reward of each step."""
    service, rewards = tinker.ServiceClient(), []
    (model,) = tinker.RestClient().get_server_capabilities().result().supported_models
    training = service.create_lora_training_client(base_model=model.model_name, rank=8, seed=seed).result()
    tokenizer = training.get_tokenizer()
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    for step in range(STEPS):
        sampler = training.save_weights_and_get_sampling_client().result()
        rules = tinker.SamplingParams(max_tokens=NEW_TOKENS, temperature=1.0, stop=[], seed=seed + 1000 * step)
        asked = [sampler.sample(tinker.ModelInput.from_ints(each), SAMPLES, rules) for each in prompts]
        scored = [rows(prompt, each.result(), tokenizer.decode) for prompt, each in zip(prompts, asked, strict=True)]
        rewards.append(sum(mean for _, mean in scored) / len(scored))
        shown = {"reward": rewards[-1]}  # on the server's page
        training.forward_backward([row for found, _ in scored for row in found], "importance_sampling", shown)
        training.optim_step(tinker.AdamParams(learning_rate=2e-2)).result()
        print(f"step {step:2}  reward {rewards[-1]:.2f}")
    print(training.save_state("no-e").result().path)
    return rewards


if __name__ == "__main__":
    REWARDS = main(*map(int, sys.argv[1:]))

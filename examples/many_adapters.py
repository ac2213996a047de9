"""64 adapters trained at once, each on a module of the standard library; then one batch of 64 prompts, each by its own."""

import sys

from roadie.embedded import corpus
from roadie.training import Decoding, Prompt, continue_prompts
from roadie.training.many import train_many

count, steps = map(int, sys.argv[1:] or (64, 200))  # a quick look: python many_adapters.py 4 10
modules = sorted(corpus.standard_library().glob("[a-z]*.py"), key=lambda path: path.stat().st_size)[-count:]
settings = {"steps": steps, "learning_rate": 3e-2, "batch_size": 1, "max_length": 64, "output": "adapters/{name}"}
jobs = [{"name": path.stem, "data": str(path), **settings} for path in modules]

result = train_many(jobs)  # the embedded model; one forward and one backward a step
before, after = (sum(getattr(job, loss) for job in result.jobs) / count for loss in ("first_loss", "last_loss"))
print(f"{count} adapters, {result.steps} steps, {result.seconds:.0f} s: mean loss {before:.2f} -> {after:.2f}")

prompts = [Prompt("    def", job.name) for job in result.jobs]
adapters = [f"{job.name}={job.output}" for job in result.jobs]
for prompt, text in zip(prompts, continue_prompts(prompts, adapters, decoding=Decoding(16)), strict=True):
    print(f"{prompt.adapter:>16}  {prompt.text + text!r}")

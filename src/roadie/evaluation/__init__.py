"""Evaluation: lm-eval's tasks over many adapters, in one pass of one engine.

    engine = ContinuousBatchingEngine(model, tokenizer, Registry.open("adapters"), settings)
    engine.start()
    results = evaluate(engine, tokenizer, ["legal", "terse"], Tasks(("arc_easy",)))
    results["legal"]["results"]["arc_easy"]["acc,none"]

lm-eval asks for one model at a time. What it asks of the first adapter is asked of all of them, in one batch, and the others find
their answers: likelihoods of continuations (multiple choice), of whole texts (perplexity), and generated texts.
"""

from __future__ import annotations

from roadie.evaluation.tasks import Tasks, evaluate

__all__ = ["Tasks", "evaluate"]

"""How well adapters learn: RoAd in its variants against the other methods of PEFT, on real text that is on every machine.

    python -m benchmarks.quality run        trains everything that is not in the records yet; may be stopped at any time
    python -m benchmarks.quality quick      trains two committed rows again and compares (make quality-quick)
    python -m benchmarks.quality report     docs/quality.md and its pictures from the committed records
    python -m benchmarks.quality reward     learning by reward on a real model (`reward.py`)
    python -m benchmarks.quality run --config FILE     any model and data set (`hub`, docs/quality-hub.md)

`methods.py` is the table of methods and `tasks.py` that of tasks; a new one is a line there. Every run is one line of
``benchmarks/results/<machine>/quality/<task>.jsonl``, written when the run ends.
"""

"""What roadie costs, measured: rivals interleaved in one process, with spread, intervals, physical limits and losses.

    make bench                   everything, at most 15 minutes on two cores: a record, and docs/performance.md from it
    make bench ARGS=--quick      a minute, to see that it runs; the record goes to .cache and the document stays as it is
    python -m benchmarks.gpu     the same on a CUDA machine, at the shapes of Llama-3.1-8B

Read `harness.py` first (how things are timed), then `rivals.py` (what is compared) and `plan.py` (which cases, how long).
"""

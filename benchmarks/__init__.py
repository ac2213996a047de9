"""What roadie costs, measured: rivals interleaved in one process, with spread, intervals, physical limits and losses.

    make bench                   everything, at most 15 minutes on two cores: a record, and docs/performance.md from it
    make bench ARGS=--quick      a minute, to see that it runs; the record goes to .cache and the document stays as it is
    make gpu                     on a CUDA machine: are the kernels right there, and what do adapters cost

Read `harness.py` first (how things are timed), then `rivals.py` (what is compared) and `plan.py` (which cases, how long).
"""

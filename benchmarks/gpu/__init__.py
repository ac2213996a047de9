"""A GPU in a few minutes: are the kernels right there, and what do adapters cost. One command on a bare machine: `make gpu`.

Nothing needs to be installed, no network, no git: PYTHONPATH is enough. `driver` starts processes, one step after the other and
the most important first, within a limit of time; `worker` is such a process and does the cases of a step; `plan` says which, and
how long they should take; `journal` keeps each case the moment it has ended. `assembled` makes the record of a journal, also of
one whose run was killed, and `report` the part of docs/performance.md. `smoke` and `suite` have what is checked, `timed` what is
measured.

A case that raises, crashes or hangs is one failure in the record, and the others go on: in a new process where they must.
`plan`, `journal` and `driver` need neither torch nor anything else that may be missing or broken on the machine.
"""

"""Where experiments/launch.py runs a command: one module per backend, and what they share.

A backend has `LINE` (what it is), `SUBMITS` (whether `run` ends once a queue has the job),
`add_arguments(parser)`, `plan(job)`, and the shell lines of `status(job)`, `logs(job)` and `stop(job)` beyond
what this machine knows itself.
"""

"""Run a command on hosts, start it again when a host dies, and sweep over configs.

`backends.py` lists the backends and says what each must provide. `request.py` checks a new job and `job.py`
records it; `plan.py` is one attempt and `supervise.py` runs attempts until one succeeds; `control.py` has the
user's actions: run, status, logs, stop. `runs.py` and `results.py` are the runs of a sweep.
"""

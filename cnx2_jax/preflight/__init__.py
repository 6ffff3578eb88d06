"""Compile a run's train step for accelerators that are not there, and read the compiled program."""

"""Weights on their way in from other libraries, and out to them and to other runtimes."""

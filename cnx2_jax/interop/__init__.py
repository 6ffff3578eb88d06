"""Imports weights from other libraries, and exports them to other libraries and runtimes."""

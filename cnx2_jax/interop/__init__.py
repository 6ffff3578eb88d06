"""Weights on their way out: a network as a file or folder that another runtime loads."""

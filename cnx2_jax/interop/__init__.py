"""Weights from and for other libraries: their names and layouts, files, folders and hub."""

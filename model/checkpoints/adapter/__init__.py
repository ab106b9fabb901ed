"""Adapters: the format of this project."""

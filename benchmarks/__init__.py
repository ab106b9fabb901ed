"""Measurements of speed, memory and precision; each writes the table that is kept beside it."""

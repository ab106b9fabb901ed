"""Soak test of the service: mixed traffic, leaks, and lost requests."""

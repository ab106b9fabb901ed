"""Benchmark of the service: closed and open loops, compared with FastAPI and LitServe."""

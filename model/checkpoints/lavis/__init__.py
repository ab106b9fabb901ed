"""The format of LAVIS."""

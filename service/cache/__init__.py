"""The embedding cache: an in-process LRU in front of an optional Redis.

Whatever happens to Redis, an answer stays right: a lost, slow or corrupt entry is a miss.
"""

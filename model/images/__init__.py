"""Image files: from the bytes of a file to the square of pixels that a vision encoder reads.

Imports neither torch nor numpy, so that a process which only decodes files is small and starts at once.
"""

"""The HTTP service: captioning, visual question answering and retrieval with a BLIP-2 checkpoint."""

"""The frozen models: image encoder and language model."""

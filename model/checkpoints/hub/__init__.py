"""The format of the Hugging Face Hub."""

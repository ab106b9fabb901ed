"""The three kinds of work the engine does in a turn; all of it runs in the engine's thread."""

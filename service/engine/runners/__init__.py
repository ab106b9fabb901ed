"""The runners: each runs one kind of step, and knows no policy."""

"""The service under ordinary load with attacks mixed into it."""

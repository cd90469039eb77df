"""Proofs that users run on their own configuration: that the layout and an interruption change no result."""

"""Timing and memory of a pass on one rank. What is run is decided elsewhere."""

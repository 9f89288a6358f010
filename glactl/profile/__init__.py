"""Operators, layers and models, timed beside what the device could do."""

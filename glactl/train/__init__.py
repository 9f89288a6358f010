"""Training: the loop, its steps, and what keeps a run safe."""

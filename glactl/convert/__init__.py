"""Checkpoints of other projects: into run folders, and run folders into theirs."""

"""Models measured by tasks: the run of them, and what is shown of it."""

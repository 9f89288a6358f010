"""Results as pages in one file."""

"""Recall over widths, mixers and learning rates: grids, trials, what came of them."""

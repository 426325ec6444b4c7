"""Scores of key blocks from block features: two small nets, a mean over later blocks, a product."""

"""Informativeness of block pairs without the matrix of scores."""

"""Causal attention of selected rows by their original positions."""

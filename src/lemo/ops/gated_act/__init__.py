"""Activation of gated and plain MLPs, and its gradient."""

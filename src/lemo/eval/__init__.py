"""Evaluation of models, dense and sparse."""

"""Rotary embedding of chosen rows, in place."""

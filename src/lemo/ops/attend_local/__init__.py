"""Attention of rows to the keys near them, and to the first of their document."""

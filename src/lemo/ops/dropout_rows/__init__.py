"""Dropout whose mask is a function of a key, the row's number and the column: made again instead of saved."""

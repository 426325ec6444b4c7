"""From rows of the residual stream to a few numbers per block."""

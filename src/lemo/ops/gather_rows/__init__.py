"""Read chosen rows out of the residual stream."""

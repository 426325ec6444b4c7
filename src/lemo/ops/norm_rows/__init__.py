"""Norm of chosen rows of the residual stream, gathered in the same pass, and its gradient."""

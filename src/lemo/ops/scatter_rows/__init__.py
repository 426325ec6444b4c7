"""Write the rows that ran a layer back into the residual stream."""

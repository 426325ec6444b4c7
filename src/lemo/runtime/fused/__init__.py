"""The fused engine: one autograd function per layer, one residual stream, only backward rows saved."""

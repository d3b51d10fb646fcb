"""A basis of the residual stream, in which its width is cut almost for free."""

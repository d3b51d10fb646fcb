"""What may be removed, one kind of part at a time: widths, heads, the residual stream, layers, branches."""

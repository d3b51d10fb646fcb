"""A basis inside each attention head, in which its size is cut: for attention without rotary positions."""

"""The towers in PyTorch, and how a checkpoint becomes them."""

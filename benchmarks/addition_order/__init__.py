"""What the order of addition does to training. Start with `__main__.py`."""

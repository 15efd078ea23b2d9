"""Effect of the order of addition on training. Start with `__main__.py`."""

"""The race: ours against other trainers on the same work. Start with `__main__.py`."""

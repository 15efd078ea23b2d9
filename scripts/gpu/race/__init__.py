"""The contestants of `scripts/gpu_race.py`, and how they are timed."""

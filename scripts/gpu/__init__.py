"""Checks on a CUDA card: `scripts/gpu_check.py` runs them, `scripts/gpu_race.py` shares parts."""

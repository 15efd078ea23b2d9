"""Fine-tune language models from one YAML recipe. Start reading at `train.py`, then `loop.py`."""

__version__ = "0.1.0"

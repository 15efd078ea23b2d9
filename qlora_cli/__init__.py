"""Fine-tune language models from one YAML recipe.

Start reading at `train/train.py`, then `loop/fit.py`.
"""

__version__ = "0.1.0"

"""Check that runs of an earlier commit still work: `python scripts/check_earlier_runs.py COMMIT`.

The code of COMMIT trains a tiny run to its end, and stops another halfway. The code of this
checkout then resumes the second run, and evaluates and merges both. The resumed run must end
with the same weights as the first. Exit status: 0 if it does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

RECIPE = """
model: {path: model}
quantization: {type: nf4}
adapter: {type: lora, r: 4, dropout: 0.1}
data:
  train: {path: rows.jsonl, format: {type: prompt_completion}}
  evaluation: {path: rows.jsonl, format: {type: prompt_completion}}
  max_length: 96
training: {max_steps: 8, batch_size: 4, micro_batch_size: 2, eval_every: 4, save_every: 4}
optimizer: {type: adamw, learning_rate: 1.0e-2}
evaluation: {tasks: [{type: exact_match}], max_new_tokens: 8}
"""

MAKE = """
import json, sys
from pathlib import Path
from tests.conftest import save_tiny_model
save_tiny_model(Path("model"))
words = ("ab", "cd", "ef", "gh")
rows = [{"prompt": f"say {w} {n}", "completion": " ".join([w] * n)} for w in words for n in (1, 2)]
Path("rows.jsonl").write_text("".join(json.dumps(row) + chr(10) for row in rows))
"""


def qlora(root: Path, folder: Path, *arguments: str) -> None:
    """Run a command line with the code of a checkout."""
    run(root, folder, "-m", "qlora_cli", *arguments)


def run(root: Path, folder: Path, *arguments: str) -> None:
    """Run Python in a folder with the code of a checkout; output goes to stderr."""
    subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(root)},
        stdout=sys.stderr,
        check=True,
    )


def main() -> int:
    """Train with the earlier code; resume, evaluate and merge with this one."""
    if len(sys.argv) != 2:
        print(__doc__)
        return 2
    git = ["git", "-C", str(ROOT), "worktree"]
    with tempfile.TemporaryDirectory() as name:
        earlier, folder = Path(name) / "earlier", Path(name) / "work"
        folder.mkdir()
        subprocess.run([*git, "add", "--detach", "--quiet", str(earlier), sys.argv[1]], check=True)
        try:
            run(earlier, folder, "-c", MAKE)
            (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
            qlora(earlier, folder, "train", "recipe.yaml", "--set", "output.dir=whole")
            qlora(earlier, folder, "train", "recipe.yaml", "--set", "output.dir=half")
        finally:
            subprocess.run([*git, "remove", "--force", str(earlier)], check=True)
        halfway = next((folder / "half" / "checkpoints").glob("*4"))
        print(f"resuming {halfway.name} of a run by {sys.argv[1]}")
        resume = ("train", "recipe.yaml", "--set", "output.dir=half", "--resume", str(halfway))
        qlora(ROOT, folder, *resume)
        for run_folder in ("whole", "half"):
            qlora(ROOT, folder, "eval", run_folder, "--json")
            qlora(ROOT, folder, "merge", run_folder, "--output", f"{run_folder}-merged")
        same = [
            (folder / "whole" / "last" / file.name).read_bytes() == file.read_bytes()
            for file in (folder / "half" / "last").glob("*.safetensors")
        ]
        steps = json.loads((folder / "half" / "run.json").read_text(encoding="utf-8"))["steps"]
    is_same = bool(same) and all(same) and steps == 8
    print(f"evaluated, merged; resumed weights are {'identical' if is_same else 'DIFFERENT'}")
    return 0 if is_same else 1


if __name__ == "__main__":
    sys.exit(main())

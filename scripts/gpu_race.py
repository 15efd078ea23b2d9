"""Race qlora against other trainers on a CUDA card: speed and memory of the same steps.

The layers are those of Llama 3.1 8B, but fewer (random weights, nothing is downloaded). Steps are
timed with all and with half of them, and scaled to 32 layers; memory is that of the fewer layers.
All contestants get the same rows, rank 16, and bfloat16. Others take part if they are installed.

Exit status: 0 all contestants ran or are not installed, 1 at least one failed, 3 there is no card.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

NO_CARD = 3
COLUMNS = (
    "trainer", "mode", "tokens/s at 32 layers", "tokens/s measured", "TFLOP/s", "of the card",
    "allocated GiB", "reserved GiB", "loss, step 1", "note",
)  # fmt: skip


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--minutes", type=float, default=10, help="end in this time (10)")
    parser.add_argument("--json", type=Path, default=Path("gpu_race.json"), metavar="FILE",
                        help="file for all figures (gpu_race.json)")  # fmt: skip
    parser.add_argument("--only", nargs="+", metavar="WORD",
                        help="run contestants with one of these words in their name")  # fmt: skip
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Run the race that the command line asks for."""
    started = time.monotonic()
    options = parse(words)
    import torch

    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no CUDA card here (torch.cuda.is_available() is false): nothing was raced")
        return NO_CARD
    from qlora_cli._compat import quiet_libraries
    from scripts.gpu.bench import Bench, sizes_of
    from scripts.gpu.older_torch import support_older_torch
    from scripts.gpu.report import print_machine

    quiet_libraries()
    print_machine(device)
    if device.type == "cuda" and (changed := support_older_torch()):
        print(changed)
    sizes = sizes_of(device)
    if device.type == "cuda":
        sizes = replace(sizes, vocabulary=128256)
    with tempfile.TemporaryDirectory(prefix="qlora-race-") as folder:
        bench = Bench(Path(folder), device, sizes, started + 60 * options.minutes)
        rows = race(bench, options)
    write(options.json, device, sizes, rows)
    print(f"\n{table(rows)}\n\nfigures in {options.json}")
    return int(any(is_failure(row) for row in rows))


def race(bench: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run the contestants in order, and print each at once."""
    from scripts.gpu.race.contest import Race, contestants

    work, rows = Race.of(bench), []
    for one in contestants():
        name = f"{one.name} {one.mode.name}"
        if options.only and not any(word in name for word in options.only):
            continue
        if bench.remaining() < one.seconds and not one.missing:
            text = f"skipped: {bench.remaining():.0f} s are left"
            row = {"name": one.name, "mode": one.mode.name, "note": text}
        else:
            row = work.run(one)
        rows.append(row)
        print(line(row), flush=True)
        write(options.json, bench.device, bench.sizes, rows)
    return rows


def is_failure(row: dict[str, Any]) -> bool:
    """Tell if a contestant failed: it was installed, and there was time."""
    return not row.get("note", "").startswith(("skipped", "not installed")) and "note" in row


def write(path: Path, device: Any, sizes: Any, rows: list[dict[str, Any]]) -> None:
    """Write all figures so far."""
    from dataclasses import asdict

    from scripts.gpu.race.contest import LAYERS, RANK
    from scripts.gpu.report import machine

    document = {
        "machine": machine(device),
        "sizes": asdict(sizes),
        "rank": RANK,
        "scaled_to_layers": LAYERS,
        "rows": rows,
    }
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def cells(row: dict[str, Any]) -> list[str]:
    """Return the cells of a row of the table."""

    def number(key: str, form: str = ",.0f", unit: float = 1.0) -> str:
        value = row.get(key)
        return "" if value is None else format(value / unit, form)

    return [
        row["name"],
        row["mode"],
        number("tokens_per_second"),
        number("tokens_per_second_measured"),
        number("teraflops", ".1f"),
        number("share_of_card", ".0%"),
        number("allocated_bytes", ".2f", 2**30),
        number("reserved_bytes", ".2f", 2**30),
        format(row["losses"][0], ".4f") if row.get("losses") else "",
        row.get("note", ""),
    ]


def line(row: dict[str, Any]) -> str:
    """Format a row for the terminal."""
    pairs = zip(COLUMNS[2:], cells(row)[2:], strict=True)
    told = "; ".join(f"{name} {cell}" for name, cell in pairs if cell)
    return f"{row['name']:<26}  {row['mode']:<30}  {told}"


def table(rows: list[dict[str, Any]]) -> str:
    """Format all rows as a Markdown table."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *map(cells, rows)]
    return "\n".join(f"| {' | '.join(one)} |" for one in lines)


if __name__ == "__main__":
    sys.exit(main())

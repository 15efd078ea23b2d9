"""Run a command of qlora under conditions that a check needs: `command.py [OPTIONS] -- WORDS...`.

Always: varlen attention adapted to an older torch. With --memory-after N: after N optimizer steps
there is no more memory, so that the next step runs out of it.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from qlora_cli.cli import main
from scripts.gpu.older_torch import support_older_torch


def end_memory_after(steps: int) -> None:
    """Leave no free memory after some optimizer steps. On a CPU, raise torch's error instead."""
    done = 0

    def raise_error(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory (as if)")

    def count(*_: Any) -> None:
        nonlocal done
        done += 1
        if done != steps:
            return
        if not torch.cuda.is_available():
            register_module_forward_pre_hook(raise_error)
            return
        torch.cuda.empty_cache()
        held, total = torch.cuda.memory_reserved(), torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(held / total)

    register_optimizer_step_post_hook(count)


if __name__ == "__main__":
    split = sys.argv.index("--")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory-after", type=int, metavar="STEPS")
    options = parser.parse_args(sys.argv[1:split])
    if torch.cuda.is_available():
        support_older_torch()
    if options.memory_after is not None:
        end_memory_after(options.memory_after)
    sys.argv = ["qlora", *sys.argv[split + 1 :]]
    main()

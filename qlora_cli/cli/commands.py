"""How commands are found and end: unknown names, and Ctrl-C."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import typer
from typer.core import TyperGroup

from qlora_cli.errors import EXIT_SIGNAL, Interrupted

_CLOSE = 0.7
"""Least likeness of a typo; `serve` and `merge` have 0.6."""

_ELSEWHERE = {
    "serve": "qlora merge writes a folder that vLLM and other servers load (docs/serving.md)",
    "server": "qlora merge writes a folder that vLLM and other servers load (docs/serving.md)",
    "deploy": "qlora merge writes a folder that vLLM and other servers load (docs/serving.md)",
    "finetune": "qlora train does that",
    "fine-tune": "qlora train does that",
    "fit": "qlora train does that",
    "run": "qlora train does that",
    "sft": "qlora train does that",
    "resume": "qlora train RECIPE --resume auto does that",
    "preprocess": "qlora preview prepares and shows the rows",
    "inference": "qlora chat and qlora generate do that",
    "infer": "qlora generate does that",
    "test": "qlora eval does that",
    "evaluate": "qlora eval does that",
    "benchmark": "qlora bench measures speed, and qlora eval answers",
    "quantize": "quantization in the recipe does it for training, and qlora export afterwards",
    "convert": "qlora export does that",
    "gguf": "qlora export --gguf does that",
    "push": "hf upload NAME FOLDER does that; qlora uploads nothing",
    "init": "copy a recipe from configs/ and change it",
    "dpo": "qlora train does that with objective: {type: dpo} in the recipe",
    "kto": "qlora train does that with objective: {type: kto} in the recipe",
    "orpo": "qlora train does that with objective: {type: orpo} in the recipe",
    "reward": "qlora train does that with objective: {type: reward} in the recipe",
    "classify": "qlora train does that with objective: {type: classify} in the recipe",
    "login": "hf auth login does that",
}
"""Commands of other tools -> what to do here."""


def with_recipe(hint: str, args: Sequence[str]) -> str:
    """Put the recipe of a command line, with its overrides, in the place of RECIPE in a hint."""
    recipe, overrides = None, []
    rest = iter(args)
    for arg in rest:
        if arg == "--set":
            overrides += [arg, next(rest, "")]
        elif arg.startswith("--set="):
            overrides.append(arg)
        elif recipe is None and arg.endswith((".yaml", ".yml")):
            recipe = arg
    if recipe is None:
        return hint
    named = [recipe, *overrides]
    return hint.replace("preview RECIPE", f"preview {shlex.join(named)}")


class Commands(TyperGroup):
    """The commands, with help for names that are not among them."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find a command; for an unknown name, say what it may have meant."""
        name = args[0] if args else ""
        if name and not name.startswith("-") and name not in self.commands:
            close = get_close_matches(name, list(self.commands), n=1, cutoff=_CLOSE)
            advice = _ELSEWHERE.get(name) or (f"did you mean {close[0]}?" if close else "")
            known = f"the commands are {', '.join(self.commands)}"
            raise typer.BadParameter(f"no command {name!r}; {advice or known}", ctx=ctx)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run a command. Ctrl-C ends it with one line."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise Interrupted("Ctrl-C", EXIT_SIGNAL + signal.SIGINT) from error

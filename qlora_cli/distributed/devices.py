"""Target devices of a plan: a GPU or a machine, by its name or its memory."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, replace
from typing import Literal

import torch

from qlora_cli.common.formatting import GIB, did_you_mean
from qlora_cli.errors import RecipeError

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Target:
    """A device that a plan is made for."""

    name: str
    kind: Device
    memory_bytes: int | None
    """Memory of the device; None if unknown."""
    teraflops: float | None = None
    """Dense 16-bit products, 10^12 operations per second, from the data sheet."""
    bandwidth: float | None = None
    """Memory bandwidth, 10^9 bytes per second."""
    has_bfloat16: bool = True
    number: int = 1
    """Number of devices that train together."""


def _card(
    name: str, memory: float, teraflops: float, bandwidth: float, *, has_bfloat16: bool = True
) -> Target:
    return Target(name, "cuda", int(memory * GIB), teraflops, bandwidth, has_bfloat16)


CARDS = (
    # Memory as the driver reports it, a little less than the nominal size.
    _card("T4", 14.6, 65, 320, has_bfloat16=False),
    _card("RTX 2080 Ti", 10.7, 54, 616, has_bfloat16=False),
    _card("RTX 3060", 11.6, 51, 360),
    _card("RTX 3090", 23.6, 71, 936),
    _card("RTX 4060 Ti 16GB", 15.6, 88, 288),
    _card("RTX 4070 Ti", 11.7, 80, 504),
    _card("RTX 4080", 15.6, 97, 717),
    _card("RTX 4090", 23.5, 165, 1008),
    _card("RTX 5090", 31.4, 210, 1792),
    _card("A10", 22.1, 125, 600),
    _card("A10G", 22.1, 70, 600),
    _card("L4", 22.0, 121, 300),
    _card("RTX A6000", 47.5, 155, 768),
    _card("RTX 6000 Ada", 47.5, 364, 960),
    _card("A40", 44.4, 150, 696),
    _card("L40S", 44.4, 362, 864),
    _card("A100 40GB", 39.4, 312, 1555),
    _card("A100", 79.2, 312, 2039),
    _card("H100", 79.1, 989, 3350),
    _card("H200", 139.7, 989, 4800),
    _card("B200", 178.0, 2250, 8000),
)
"""Common GPUs; figures from their data sheets."""

_BEFORE_TURING = re.compile(r"(tesla)?[vpkm]\d{2,3}s?(16gb|32gb)?|titan(v|x|xp)|gtx(9|10)\d\d(ti)?")
"""Names of GPUs for which torch's builds for CUDA 13 have no code."""

_SIZE = re.compile(r"(\d+(?:\.\d+)?) *(gib|gb|g)", re.IGNORECASE)


def find_target(name: str, number: int = 1) -> Target:
    """Find the device that `--device` names.

    Raises:
        RecipeError: the name is unknown.
    """
    wanted = _plain(name)
    if wanted == "cpu":
        return replace(this_machine(), number=number)
    if wanted == "cuda":
        return replace(this_card() or Target("CUDA", "cuda", None), number=number)
    if size := _SIZE.fullmatch(name.strip()):
        unit = GIB if size[2].lower() in ("gib", "g") else 10**9
        return Target(name, "cuda", int(float(size[1]) * unit), number=number)
    if _BEFORE_TURING.fullmatch(wanted.removeprefix("nvidia").removeprefix("geforce")):
        raise RecipeError(
            f"--device: {name} is older than Turing (sm_75), and torch for CUDA 13 has no code for "
            "it: a run would stop at its first kernel",
            hint="with torch for an older CUDA, give the amount of memory, such as --device 16GiB",
        )
    for card in CARDS:
        if _plain(card.name) in (wanted, wanted.removeprefix("nvidia").removeprefix("geforce")):
            return replace(card, number=number)
    refuse_several(name)
    raise RecipeError(
        f"--device: {name} is unknown{did_you_mean(name, [card.name for card in CARDS])}",
        hint="use cpu, cuda, an amount of memory such as 24GiB, or one of "
        + ", ".join(card.name for card in CARDS),
    )


_NUMBER_FIRST = re.compile(r"(\d+)(?: *[x×*] *| +)(.+)", re.IGNORECASE)
_NUMBER_LAST = re.compile(r"(.+?) *[x×*] *(\d+)", re.IGNORECASE)


def refuse_several(name: str) -> None:
    """Raise RecipeError if a name is that of several devices, such as `4 x H100` or `A100,A100`."""
    cards = [one.strip() for one in re.split(r"[,+;]", name)]
    number, card = len(cards), cards[0]
    if first := _NUMBER_FIRST.fullmatch(name.strip()):
        number, card = int(first[1]), first[2]
    elif last := _NUMBER_LAST.fullmatch(name.strip()):
        number, card = int(last[2]), last[1]
    names = {_plain(one.name) for one in CARDS}
    if number == 1 or not (_plain(card) in names or _SIZE.fullmatch(card)):
        return
    if len(set(map(_plain, cards))) > 1:
        raise RecipeError(
            f"--device: {name} names different devices; a plan is for one kind",
            hint="name the smallest, and give --gpus for their number",
        )
    raise RecipeError(
        f"--device: {name} names several devices",
        hint=f"--device {shlex.quote(card)} --gpus {number}",
    )


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower()).removesuffix("80gb")


def this_machine() -> Target:
    """Return this CPU, with its free memory."""
    import psutil

    return Target("CPU", "cpu", psutil.virtual_memory().available)


def this_card(device: torch.device | None = None) -> Target | None:
    """Return a CUDA device of this machine, with its memory.

    Args:
        device: the device of a run, whose memory is what other processes leave free; None is the
            first device, with all of its memory.
    """
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(device or 0)
    name, memory = found.name, found.total_memory
    known = known_card(name, memory)
    # Cards before Ampere emulate bfloat16, which a run does not use.
    target = known or Target(name, "cuda", memory, has_bfloat16=found.major >= 8)
    if device is not None:
        memory = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return replace(target, name=name, memory_bytes=memory)


_OTHERS = {"ti", "super", "laptop", "mobile", "d"}
"""Words in a name that make it a different GPU."""


def known_card(name: str, memory_bytes: int) -> Target | None:
    """Find a GPU by the driver's name, such as `NVIDIA A100-SXM4-80GB`; None if not in the table.

    Every word of the table's name must occur, so that an A100 is not taken for an A10. Among GPUs
    that differ only in memory, the nearest size wins.
    """
    words = _words(name)
    found = [
        card
        for card in CARDS
        if (own := _words(card.name)) <= words and not (words - own) & _OTHERS
    ]
    return min(found, key=lambda card: abs((card.memory_bytes or 0) - memory_bytes), default=None)


def _words(name: str) -> set[str]:
    """Split a name into words, without the memory size, which only some names contain."""
    return {w for w in re.findall(r"[a-z0-9]+", name.lower()) if not re.fullmatch(r"\d+gb", w)}

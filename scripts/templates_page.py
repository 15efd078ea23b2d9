"""Write docs/templates.md from the stored outcomes of chat templates; `gen_docs.py` calls it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden"

Outcomes = dict[str, dict[str, dict[str, Any]]]
"""The outcome by template and by kind of conversation."""

TEMPLATES_HEAD = """\
<!-- Written by scripts/gen_docs.py from tests/golden/templates.json; see there. -->
# Chat templates

`qlora` trains only on what the model has to write after the generation prompt, up to and including
the token that ends the turn. If this cannot be verified for a conversation, the conversation is
refused with the reason. This page lists the outcome for chat templates of
well-known models, as collected by the library TRL, and [at its end](#templates-of-axolotl-and-vllm)
of those that axolotl and vLLM bring. Each was tried with the conversations of
`tests/golden/templates.py`.

**Exact** means, for every conversation tried: the tokens are those of `apply_chat_template`; the
row begins with the generation prompt of each supervised turn; the answer (with its reasoning and
tool calls) and the token that ends the turn are supervised; there is at most one BOS.

- **Text that a template puts before the content** is supervised if the model has to write it: an
  empty block of reasoning (Qwen 3, GLM), the channel (GPT-OSS).
- **Several tokens that end a turn** (Command A: `<|END_RESPONSE|>`, then EOS): all of them are
  supervised, up to EOS if it ends every turn, or else up to the last. Generation here stops at the
  first of them, and elsewhere at EOS. What a template writes only after the last turn (Phi 3: EOS
  after `<|end|>`) is not supervised. The column "ends with" has the tokens of each template.
- **An early answer alone** (column "early"): where the template changes it when the conversation
  continues, the row ends after it.
- **Split**: some templates change an answer when the conversation continues: they remove its
  reasoning, or end it with another token. Such a conversation becomes several rows, and in each the
  last answer is as the model has to write it, with supervised reasoning. For an answer without
  reasoning, Qwen 3 omits only the empty block; that answer is supervised as it is, and the
  conversation is not split.
- **DeepSeek R1 and V3**: the generation prompt opens a block of reasoning that the template removes
  from every answer. The row is the prompt, the reasoning (or none), `</think>`, an empty line and
  the answer: what the model has to write, although the template never shows it.
- **GLM 4**: a turn ends where the next one begins. The last answer gets the token that would
  follow: `<|user|>`, or `<|observation|>` after a tool call.
- **Nemotron 3** opens a block of reasoning in its generation prompt, but writes answers without
  reasoning in another form, so the prompt is not their prefix. Answers without reasoning are exact
  with `{% set enable_thinking = false %}` in front of the template: save it to a file, and name the
  file in `data.chat_template`. The tuned model keeps that template. `reasoning_effort` and similar
  variables of other templates can be set in the same way.
- **Llama 3.2 and GPT-OSS** write today's date into the system message. Here it is always 26 July
  2024 (the fallback of Llama's templates), in training as in `eval`, `generate` and `chat`: rows
  must not depend on the day on which they are prepared. The template saved with the model is
  unchanged.
"""

PACKAGES_HEAD = """\
## Templates of axolotl and vLLM

The templates in the wheels of axolotl 0.19.0 and vLLM 0.33.0, tried with the same conversations.

- **No stop token**: the template writes no special token after an answer. `qlora train` stops when
  it prepares the rows, and asks for another template.
- **vLLM's ChatML** ends a turn only if another follows. The last answer gets the token that would
  follow: `<|im_end|>`.
- **axolotl's Gemma 4** writes an empty block of thought in its generation prompt and not before
  answers. **axolotl's Qwen 3 and 3.5** write an empty line after `<think>` in the prompt and not
  before reasoning; **vLLM's MiniCPM-V 4.5** closes the block in the prompt.
- **Kimi Audio** reads `conversations` instead of `messages`, so it shows none of them.
- **axolotl's Command A for documents and for tools** write the same prompt with or without
  `add_generation_prompt`, and leave `<|START_RESPONSE|>` to the model.
- **axolotl's Mistral 2, 3 and Pixtral** write the system message only if the last turn is the
  user's, so an answer would be trained without it.
"""


def templates_page() -> list[str]:
    """Return the lines of docs/templates.md."""
    kept: Outcomes = json.loads((GOLDEN / "templates.json").read_text(encoding="utf-8"))
    kinds = list(next(iter(kept.values())))
    reasons: list[str] = []

    def cell(entry: dict[str, Any]) -> str:
        if entry["outcome"] == "exact":
            return "exact" if entry["rows"] == entry["conversations"] else "exact, split"
        reason = _reason(entry)
        if reason not in reasons:
            reasons.append(reason)
        return f"refused ({reasons.index(reason) + 1})"

    rows = []
    for name, entries in kept.items():
        checked = sum(entry.get("conversations", 0) for entry in entries.values())
        cells = [cell(entries[kind]) for kind in kinds]
        # The answer of the first conversation is "Paris."; what follows ends the turn.
        rows_of_texts = entries["single"].get("supervised", [])
        ending = rows_of_texts[0][0].rpartition("Paris.")[2] if rows_of_texts else ""
        cells.append(f"`{json.dumps(ending, ensure_ascii=False)[1:-1]}`" if ending else "")
        cells[-1] = cells[-1].replace("|", "\\|")
        rows.append(f"| {' | '.join([f'`{name}`', *cells, str(checked)])} |")
    head = f"| {' | '.join(['template', *kinds, 'ends with', 'conversations checked'])} |"
    plain = {name: entries for name, entries in kept.items() if "," not in name}
    whole = sum(
        all(entries[kind]["outcome"] == "exact" for kind in ("single", "multi"))
        for entries in plain.values()
    )
    return [
        TEMPLATES_HEAD,
        f"Exact for single and for several turns: {whole} of {len(plain)}.\n",
        head,
        "|---" * (len(kinds) + 3) + "|",
        *rows,
        "",
        "## Why some are refused",
        "",
        *(f"{number}. {_quoted(reason)}" for number, reason in enumerate(reasons, start=1)),
        "",
        *_of_packages(kinds),
    ]


def _of_packages(kinds: list[str]) -> Iterator[str]:
    kept: Outcomes = json.loads((GOLDEN / "templates_packages.json").read_text(encoding="utf-8"))
    yield PACKAGES_HEAD
    yield f"| {' | '.join(['package', 'templates', *kinds])} |"
    yield "|---" * (len(kinds) + 2) + "|"
    for package in dict.fromkeys(name.partition("/")[0] for name in kept):
        own = [entries for name, entries in kept.items() if name.startswith(f"{package}/")]
        counts = (Counter(entries[kind]["outcome"] for entries in own) for kind in kinds)
        cells = (", ".join(f"{count[key]} {key}" for key in sorted(count)) for count in counts)
        yield f"| {' | '.join([package, str(len(own)), *cells])} |"
    yield "\nNot exact, by reason:\n"
    # By reason, and for each template the kinds of conversations.
    found: dict[str, dict[str, list[str]]] = {}
    for name, entries in kept.items():
        for kind in kinds:
            if entries[kind]["outcome"] != "exact":
                # Where the prompt and the row part depends on the words of the conversation.
                reason = _reason(entries[kind]).partition(": the prompt has ")[0]
                found.setdefault(reason, {}).setdefault(name, []).append(kind)
    for reason, templates in found.items():
        yield f"- {_quoted(reason)}"
        same: dict[str, list[str]] = {}
        for name, where in templates.items():
            same.setdefault(", ".join(where), []).append(f"`{name}`")
        yield from (f"  - {where}: {', '.join(names)}" for where, names in same.items())


def _reason(entry: dict[str, Any]) -> str:
    return re.sub(r"^message \d+ \(\w+\): ", "", entry["reason"])


def _quoted(reason: str) -> str:
    return f"`` {reason} ``"

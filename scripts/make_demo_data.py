"""Write the demo data: requests in everyday English, and the JSON that a calendar can act on.

    Could you reserve time at 15:30 on Friday for a pottery workshop with Nadia?
    {"action":"event","what":"pottery workshop","who":"Nadia","day":"friday","time":"15:30"}

The test rows are a fair examination: their names, activities, tasks and a third of their sentences
are never seen in training (`demo_words.py`), and no request stands in both files. The same seed
gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

from demo_words import TEST, TRAIN, VERBS, WORDS, Words

# Short: it stands in every row, and the adapter learns what the JSON looks like.
SYSTEM = "Request to JSON."

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

# Invented names: who has only ever copied names from a list has not learnt to copy.
SYLLABLES = (
    ("Ba", "Ce", "Di", "Fo", "Gu", "Ha", "Ke", "Li", "Mo", "Nu", "Pa", "Re", "Si", "To", "Vu"),
    ("la", "me", "ni", "ro", "su", "ta", "ve", "xi", "do", "ga", "ke", "li"),
    ("n", "r", "s", "lo", "na", "ra", "th", "x", "do", "lia", "mir", "ven", "sa"),
)


@dataclass(frozen=True)
class Answer:
    """The fixed schema. A fact that the request does not give is null."""

    action: str
    what: str
    who: str | None
    day: str
    """A weekday, `today` or `tomorrow`."""
    time: str | None
    """Such as `9:15` or `14:30`."""

    def to_json(self) -> str:
        """All keys, always in this order, and no spaces: as few tokens as can be."""
        return json.dumps(asdict(self), ensure_ascii=False, separators=(",", ":"))


@dataclass(frozen=True)
class Request:
    text: str
    answer: Answer

    def to_row(self) -> dict[str, object]:
        """A row in the format `messages`."""
        return {
            "messages": [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": self.text},
                {"role": "assistant", "content": self.answer.to_json()},
            ]
        }


class Writer:
    """Writes requests with the words of one split.

    Args:
        known: if given, two of three sentences are of those words; the values never are.
        is_teacher: put words together at random and invent names, so that copying what the
            request says is the only way to be right.
    """

    def __init__(
        self, words: Words, random: Random, *, known: Words | None = None, is_teacher: bool = False
    ) -> None:
        self.words = words
        self.random = random
        self.known = known
        self.is_teacher = is_teacher

    def request(self) -> Request:
        """A request for an event or for a reminder, in equal parts."""
        if self.random.random() < 0.5:
            return self.say("event", self.activity())
        return self.say("reminder", self.task())

    def activity(self) -> str:
        if self.is_teacher and self.random.random() < 0.8:
            return " ".join(self.random.sample(WORDS, 2))
        head = self.random.choice(list(self.words.activities))
        return f"{self.random.choice(self.words.activities[head])} {head}"

    def task(self) -> str:
        if self.is_teacher and self.random.random() < 0.8:
            return f"{self.random.choice(VERBS)} the {self.random.choice(WORDS)}"
        verb = self.random.choice(list(self.words.tasks))
        return f"{verb} {self.random.choice(self.words.tasks[verb])}"

    def name(self) -> str:
        if self.is_teacher and self.random.random() < 0.3:
            return "".join(self.random.choice(part) for part in SYLLABLES)
        return self.random.choice(self.words.names)

    def when(self) -> tuple[str, str, str | None]:
        """Day and time as said in one phrase, then each as written."""
        random = self.random
        day = random.choice((*DAYS, "today", "tomorrow"))
        said = random.choice(("on {}", "this {}")).format(day) if day in DAYS else day
        if random.random() < 0.25:
            return said, day.lower(), None
        time = f"{random.randint(6, 22)}:{random.choice(range(0, 60, 5)):02}"
        both = random.choice((f"{said} at {time}", f"at {time} {said}"))
        return both, day.lower(), time

    def sentence(self, action: str) -> str:
        words = self.known if self.known and self.random.random() < 2 / 3 else self.words
        sentences = words.event_sentences if action == "event" else words.reminder_sentences
        return self.random.choice(sentences)

    def say(self, action: str, what: str) -> Request:
        """Choose a sentence and fill it in."""
        sentence = self.sentence(action)
        has_who = "{who}" in sentence or ("{with}" in sentence and self.random.random() < 0.6)
        who = self.name() if has_who else None
        said, day, time = self.when()
        slots = {
            "what": what,
            "What": what[0].upper() + what[1:],
            "a what": f"{'an' if what[0] in 'aeiouAEIOU' else 'a'} {what}",
            "who": who or "",
            "with": f" with {who}" if who else "",
            "when": f" {said}",
            "When": said[0].upper() + said[1:],
        }
        text = re.sub(r"\{([^}]+)\}", lambda slot: slots[slot[1]], sentence)
        return Request(text[0].upper() + text[1:], Answer(action, what, who, day, time))


def normalise(text: str) -> str:
    """What two requests share when they differ in case, spacing and punctuation alone."""
    return " ".join(re.findall(r"\w+", text.lower()))


def make_requests(writer: Writer, number: int) -> list[Request]:
    """`number` different requests."""
    requests: dict[str, Request] = {}
    while len(requests) < number:
        request = writer.request()
        requests.setdefault(normalise(request.text), request)
    return list(requests.values())


def shared_values(train: list[Request], test: list[Request]) -> set[str]:
    """Texts, whats and whos that stand on both sides of the split."""

    def values(requests: list[Request]) -> set[str]:
        answers = [(normalise(r.text), r.answer.what, r.answer.who) for r in requests]
        return {value for answer in answers for value in answer if value is not None}

    return values(train) & values(test)


def make_splits(*, num_train: int, num_test: int, seed: int) -> dict[str, list[Request]]:
    """Requests by file name."""
    teacher = Writer(TRAIN, Random(f"train {seed}"), is_teacher=True)
    examiner = Writer(TEST, Random(f"test {seed}"), known=TRAIN)
    train, test = make_requests(teacher, num_train), make_requests(examiner, num_test)
    shared = shared_values(train, test)
    assert not shared, f"on both sides of the split: {sorted(shared)}"
    return {"train.jsonl": train, "test.jsonl": test}


def write(path: Path, requests: list[Request], *, overwrite: bool) -> str:
    """Write one file, and say what was done. Never replaces other content unless told to."""
    content = "".join(json.dumps(r.to_row(), ensure_ascii=False) + "\n" for r in requests)
    if path.exists() and path.read_text(encoding="utf-8") == content:
        return f"{path}: {len(requests)} rows, already there"
    if path.exists() and not overwrite:
        sys.exit(f"{path}: there is another file of this name. Give --overwrite to replace it.")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return f"{path}: {len(requests)} rows written"


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder to write to")
    parser.add_argument("--train", type=int, default=880, help="rows to learn from")
    parser.add_argument("--test", type=int, default=200, help="rows held out")
    parser.add_argument("--seed", type=int, default=0, help="other seeds give other rows")
    parser.add_argument("--overwrite", action="store_true", help="replace files that differ")
    options = parser.parse_args()

    splits = make_splits(num_train=options.train, num_test=options.test, seed=options.seed)
    for name, requests in splits.items():
        print(write(options.output / name, requests, overwrite=options.overwrite))


if __name__ == "__main__":
    main()

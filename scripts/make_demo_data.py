"""Write the demo data: requests in everyday English, and the JSON that a booking desk can act on.

    Set room B210 aside for Dr Okafor on Friday at 15:30.
    {"action":"book","room":"B210","who":"Dr Okafor","day":"friday","time":"15:30"}

The test is fair: names, rooms and a third of the sentences in the test rows never occur in training
(`demo_words.py`), and the two files share no request. The same seed gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

from demo_words import TEST, TRAIN, Words

# Short: it stands in every row, and the adapter learns what the JSON looks like.
SYSTEM = "Request to JSON."

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

TITLES = ("Mr", "Ms", "Dr", "Prof")


@dataclass(frozen=True)
class Answer:
    """The fixed schema."""

    action: str
    """`book` or `cancel`."""
    room: str
    """A letter and three digits."""
    who: str
    """Title and name."""
    day: str
    """A weekday, `today` or `tomorrow`."""
    time: str
    """Such as `9:15` or `14:30`."""

    def to_json(self) -> str:
        """Return compact JSON with the keys in a fixed order, to need few tokens."""
        return json.dumps(asdict(self), ensure_ascii=False, separators=(",", ":"))


@dataclass(frozen=True)
class Request:
    text: str
    answer: Answer

    def to_row(self) -> dict[str, object]:
        """Return a row in the format `messages`."""
        return {
            "messages": [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": self.text},
                {"role": "assistant", "content": self.answer.to_json()},
            ]
        }


class Writer:
    """Write requests with the words of one split.

    Args:
        known: if given, two of three sentences use these words; the values never do.
        is_teacher: invent some of the names, so that only copying from the request gives the right
            answer, and leave out the rooms that are reserved for testing.
    """

    def __init__(
        self, words: Words, random: Random, *, known: Words | None = None, is_teacher: bool = False
    ) -> None:
        self.words = words
        self.random = random
        self.known = known
        self.is_teacher = is_teacher

    def name(self) -> str:
        """Draw a name. In training, two of three are invented from the halves of two names, so
        that the model learns to copy any name instead of a fixed list.
        """
        name = self.random.choice(self.words.names)
        if self.is_teacher and self.random.random() < 2 / 3:
            other = self.random.choice(self.words.names)
            name = name[: (len(name) + 1) // 2] + other[len(other) // 2 :]
        return f"{self.random.choice(TITLES)} {name}"

    def room(self) -> str:
        """Draw a room. Every fifth number is used only by test rows."""
        number = 5 * self.random.randint(20, 198)
        if self.is_teacher:
            number += self.random.randint(1, 4)
        return f"{self.random.choice('ABCDEFGH')}{number}"

    def sentence(self, action: str) -> str:
        words = self.known if self.known and self.random.random() < 2 / 3 else self.words
        if action == "book":
            sentences, verbs = words.book, words.book_verbs
        else:
            sentences, verbs = words.cancel, words.cancel_verbs
        sentence = self.random.choice(sentences)
        return (
            sentence.replace("{do}", self.random.choice(verbs)) if "{do}" in sentence else sentence
        )

    def request(self) -> Request:
        """Draw facts and a sentence, and fill the sentence in."""
        random = self.random
        action = random.choice(("book", "cancel"))
        room, who = self.room(), self.name()
        day = random.choice((*DAYS, "today", "tomorrow"))
        said_day = random.choice(("on {}", "this {}")).format(day) if day in DAYS else day
        time = f"{random.randint(6, 22)}:{random.choice(range(0, 60, 5)):02}"
        slots = {
            "room": random.choice((room, f"room {room}")),
            "who": who,
            "when": random.choice((f"{said_day} at {time}", f"at {time} {said_day}")),
        }
        text = self.sentence(action).format(**slots)
        return Request(text[0].upper() + text[1:], Answer(action, room, who, day.lower(), time))


def normalise(text: str) -> str:
    """Remove case, spacing and punctuation, to find duplicate requests."""
    return " ".join(re.findall(r"\w+", text.lower()))


def make_requests(writer: Writer, number: int) -> list[Request]:
    """Make `number` different requests."""
    requests: dict[str, Request] = {}
    while len(requests) < number:
        request = writer.request()
        requests.setdefault(normalise(request.text), request)
    return list(requests.values())


def shared_values(train: list[Request], test: list[Request]) -> set[str]:
    """Return texts, rooms and names that occur in both splits."""

    def values(requests: list[Request]) -> set[str]:
        answers = [(normalise(r.text), r.answer.room, r.answer.who.split()[1]) for r in requests]
        return {value for answer in answers for value in answer}

    return values(train) & values(test)


def make_splits(*, num_train: int, num_test: int, seed: int) -> dict[str, list[Request]]:
    """Make the requests of each file."""
    teacher = Writer(TRAIN, Random(f"train {seed}"), is_teacher=True)
    examiner = Writer(TEST, Random(f"test {seed}"), known=TRAIN)
    train, test = make_requests(teacher, num_train), make_requests(examiner, num_test)
    shared = shared_values(train, test)
    assert not shared, f"on both sides of the split: {sorted(shared)}"
    return {"train.jsonl": train, "test.jsonl": test}


def write(path: Path, requests: list[Request], *, overwrite: bool) -> str:
    """Write one file and return a message. Replace different content only with `overwrite`."""
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
    parser.add_argument("--train", type=int, default=720, help="rows to learn from")
    parser.add_argument("--test", type=int, default=200, help="rows held out")
    parser.add_argument("--seed", type=int, default=0, help="other seeds give other rows")
    parser.add_argument("--overwrite", action="store_true", help="replace files that differ")
    options = parser.parse_args()

    splits = make_splits(num_train=options.train, num_test=options.test, seed=options.seed)
    for name, requests in splits.items():
        print(write(options.output / name, requests, overwrite=options.overwrite))


if __name__ == "__main__":
    main()

"""Write the demo data: requests in everyday English, and the JSON that a program can act on.

    Pencil in a pottery workshop with Nadia at half past three in the afternoon on Friday.
    {"action":"event","what":"pottery workshop","who":"Nadia","day":"friday","time":"15:30",
     "count":null}

The test rows are a fair examination: their names, activities, tasks, products, small talk and
sentences are never seen in training (`demo_words.py`), and no request stands in both files. The
same seed gives the same bytes.
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

SYSTEM = "Turn the request into JSON: action, what, who, day, time, count."
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = {
    "January": 31, "February": 29, "March": 31, "April": 30, "May": 31, "June": 30,
    "July": 31, "August": 31, "September": 30, "October": 31, "November": 30, "December": 31,
}  # fmt: skip
NUMBERS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
    "nineteen", "twenty",
]  # fmt: skip
UNITS = {
    "box": "boxes", "bag": "bags", "pack": "packs", "jar": "jars", "carton": "cartons",
    "crate": "crates", "tin": "tins", "case": "cases",
}  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """The fixed schema. A fact that the request does not give is null."""

    action: str
    what: str
    who: str | None
    day: str | None
    """A weekday, `today`, `tomorrow`, or a date as MM-DD."""
    time: str | None
    """HH:MM, from 00:00 to 23:59."""
    count: int | None

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


def ordinal(number: int) -> str:
    """1st, 2nd, 3rd, 4th, 11th, 21st ..."""
    if 10 <= number % 100 <= 20:
        return f"{number}th"
    return f"{number}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10, 'th') }"


def make_day(random: Random) -> tuple[str, str]:
    """A day as it is said (with its preposition) and as it is written down."""
    kind = random.random()
    if kind < 0.55:
        day = random.choice(DAYS)
        return random.choice(("on {}", "this {}", "on {}", "{}")).format(day), day.lower()
    if kind < 0.72:
        day = random.choice(("today", "tomorrow"))
        return day, day
    month, length = random.choice(list(MONTHS.items()))
    date = random.randint(1, length)
    forms = (
        f"on {date} {month}",
        f"on {month} {date}",
        f"on {month} {ordinal(date)}",
        f"on the {ordinal(date)} of {month}",
    )
    return random.choice(forms), f"{list(MONTHS).index(month) + 1:02}-{date:02}"


def part_of_day(hour: int) -> str:
    if hour < 12:
        return "in the morning"
    return "in the afternoon" if hour < 18 else "in the evening"


def spoken_time(hour: int, minute: int) -> str:
    """`quarter to six in the afternoon`: full, quarter and half hours in words."""
    clock_hour = NUMBERS[((hour if minute <= 30 else hour + 1) - 1) % 12 + 1]
    amount = {15: "quarter past ", 30: "half past ", 45: "quarter to ", 0: ""}[minute]
    return f"{amount}{clock_hour} {part_of_day(hour)}"


def make_time(random: Random) -> tuple[str, str]:
    """A time as it is said and as HH:MM."""
    hour, minute = random.randint(6, 22), random.choice((0, 0, 15, 30, 30, 45, *range(5, 60, 5)))
    half = "am" if hour < 12 else "pm"
    twelve = (hour - 1) % 12 + 1
    short = f"{twelve}" if minute == 0 else f"{twelve}:{minute:02}"
    forms = [
        f"{hour:02}:{minute:02}",
        f"{short} {half}",
        f"{short}{half}",
        f"{short} {part_of_day(hour)}",
    ]
    if minute % 15 == 0:
        forms += [spoken_time(hour, minute)] * 3
    if (hour, minute) == (12, 0):
        forms = ["noon", "midday"]
    return random.choice(forms), f"{hour:02}:{minute:02}"


def make_when(
    random: Random, chances: tuple[float, float, float]
) -> tuple[str, str | None, str | None]:
    """Day and time as said in one phrase, then each as written; chances of both, day, time."""
    both, day_only, time_only = chances
    kind = random.random()
    said_day, day = make_day(random)
    said_time, time = make_time(random)
    if kind < both:
        forms = (
            f"{said_day} at {said_time}",
            f"at {said_time} {said_day}",
            f"{said_day}, {said_time}",
        )
        return random.choice(forms), day, time
    if kind < both + day_only:
        return said_day, day, None
    if kind < both + day_only + time_only:
        return f"at {said_time}", None, time
    return "", None, None


def make_count(random: Random) -> tuple[str, int]:
    """A number of boxes, bags ... as said, and the number."""
    unit, units = random.choice(list(UNITS.items()))
    special = {"a": 1, "one": 1, "a couple of": 2, "half a dozen": 6, "a dozen": 12}
    if random.random() < 0.2:
        words, count = random.choice(list(special.items()))
    else:
        count = random.choice((random.randint(2, 9), random.randint(10, 60)))
        words = str(count)
        if count < len(NUMBERS) and random.random() < 0.6:
            words = NUMBERS[count]
    return f"{words} {unit if count == 1 else units}", count


class Writer:
    """Writes requests with the words of one split."""

    def __init__(self, words: Words, random: Random) -> None:
        self.words = words
        self.random = random

    def invented_name(self) -> str:
        return "".join(self.random.choice(part) for part in self.words.syllables)

    def name(self) -> str:
        """A first name, known or invented, sometimes with a family name."""
        random = self.random
        first = random.choice(self.words.names) if random.random() < 0.6 else self.invented_name()
        return f"{first} {self.invented_name()}" if random.random() < 0.15 else first

    def phrase(self, words: dict[str, tuple[str, ...]]) -> tuple[str, str]:
        """A head word and one of its companions."""
        head = self.random.choice(list(words))
        return head, self.random.choice(words[head])

    def request(self) -> Request:
        return self.random.choice((self.event, self.reminder, self.order))()

    def event(self) -> Request:
        head, kind = self.phrase(self.words.activities)
        when = make_when(self.random, (0.75, 0.1, 0.08))
        return self.say(self.words.event_sentences, "event", f"{kind} {head}".strip(), when)

    def reminder(self) -> Request:
        verb, thing = self.phrase(self.words.tasks)
        what = f"{verb} {thing}".replace("{name}", self.name())
        when = make_when(self.random, (0.55, 0.15, 0.15))
        return self.say(self.words.reminder_sentences, "reminder", what, when)

    def order(self) -> Request:
        head, kind = self.phrase(self.words.products)
        brand = f"{self.invented_name()} " if self.random.random() < 0.3 else ""
        when = make_when(self.random, (0.15, 0.4, 0.05))
        return self.say(self.words.order_sentences, "order", f"{brand}{kind} {head}", when)

    def say(
        self,
        sentences: tuple[str, ...],
        action: str,
        what: str,
        when: tuple[str, str | None, str | None],
    ) -> Request:
        """Choose a sentence that the facts fit, fill it in, and put small talk around it."""
        random = self.random
        said_when, day, time = when
        sentence = random.choice([s for s in sentences if said_when or "{When}" not in s])
        optional_who = any(slot in sentence for slot in ("{with}", "{for}"))
        has_who = "{who}" in sentence or (optional_who and random.random() < 0.55)
        who = self.name() if has_who else None
        said_count, count = make_count(random)
        article = random.choice(("the", "my", "a", "a", "a"))
        if article == "a" and what[0] in "aeiouAEIOU":
            article = "an"
        slots = {
            "what": what,
            "What": what[0].upper() + what[1:],
            "a what": f"{article} {what}",
            "who": who or "",
            "with": f" {random.choice(('with', 'with', 'together with'))} {who}" if who else "",
            "for": f" for {who}" if who else "",
            "when": f" {said_when}" if said_when else "",
            "When": said_when[:1].upper() + said_when[1:],
            "count": said_count,
        }
        text = re.sub(r"\{([^}]+)\}", lambda slot: slots[slot[1]], sentence)
        text = self.with_small_talk(text[0].upper() + text[1:])
        return Request(
            text, Answer(action, what, who, day, time, count if action == "order" else None)
        )

    def with_small_talk(self, text: str) -> str:
        random = self.random
        before = f"{random.choice(self.words.before)} " if random.random() < 0.25 else ""
        after = f" {random.choice(self.words.after)}" if random.random() < 0.25 else ""
        return before + text + after


def normalise(text: str) -> str:
    """What two requests share when they differ in case, spacing and punctuation alone."""
    return " ".join(re.findall(r"\w+", text.lower()))


def make_requests(words: Words, number: int, seed: str) -> list[Request]:
    """`number` different requests."""
    writer = Writer(words, Random(seed))
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
    train = make_requests(TRAIN, num_train, f"train {seed}")
    test = make_requests(TEST, num_test, f"test {seed}")
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder to write to")
    parser.add_argument("--train", type=int, default=1200, help="rows to learn from")
    parser.add_argument("--test", type=int, default=240, help="rows held out")
    parser.add_argument("--seed", type=int, default=0, help="other seeds give other rows")
    parser.add_argument("--overwrite", action="store_true", help="replace files that differ")
    options = parser.parse_args()

    splits = make_splits(num_train=options.train, num_test=options.test, seed=options.seed)
    for name, requests in splits.items():
        print(write(options.output / name, requests, overwrite=options.overwrite))


if __name__ == "__main__":
    main()

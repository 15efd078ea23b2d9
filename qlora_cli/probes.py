"""Texts on which two forms of a model are held against each other."""

TEXTS = (
    "The quick brown fox jumps over the lazy dog, and then it goes home.",
    "Q: A train leaves at 9:40 and arrives at 11:05. How long does the journey take?\nA:",
    "def fibonacci(n):\n    if n < 2:\n        return n\n\treturn  1234567",
    '{"name": "table", "legs": 4, "colours": ["red", "blue"]}',
    "Übermorgen fahren wir ans Meer. C'est la vie. Mañana será otro día. 明日も。 👋🏽",
)

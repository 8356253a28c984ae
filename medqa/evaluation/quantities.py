"""Numbers in an answer that stand nowhere in its reference: where a model makes up a dose, it shows here.

A number that is in no reference need not be wrong, nor one that is in it be right where it stands.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

# Unit as written (lower case) to what it measures and how many of the smallest unit of that it is.
_UNITS: dict[str, tuple[str, int]] = {}
for _kind, _factor, _names in (
    ("mass", 1, "mcg µg μg ug microgram micrograms"),
    ("mass", 1_000, "mg mgs milligram milligrams"),
    ("mass", 1_000_000, "g gm gram grams"),
    ("mass", 1_000_000_000, "kg kgs kilogram kilograms"),
    ("volume", 1, "ml mls cc milliliter milliliters millilitre millilitres"),
    ("volume", 100, "dl deciliter deciliters decilitre decilitres"),
    ("volume", 1_000, "l liter liters litre litres"),
    ("units", 1, "iu unit units"),
    ("percent", 1, "% percent"),
    ("pieces", 1, "tablet tablets pill pills capsule capsules"),
    ("drops", 1, "drop drops"),
    ("puffs", 1, "puff puffs"),
    ("spoons", 1, "teaspoon teaspoons"),
    ("time", 1, "second seconds sec"),
    ("time", 60, "minute minutes min mins"),
    ("time", 3_600, "hour hours hr hrs"),
    ("time", 86_400, "day days"),
    ("time", 604_800, "week weeks"),
    ("months", 1, "month months"),
    ("months", 12, "year years yr yrs"),
    ("pressure", 1, "mmhg"),
    ("length", 1, "mm millimeter millimeters millimetre millimetres"),
    ("length", 10, "cm centimeter centimeters centimetre centimetres"),
    ("temperature", 1, "°c °f degrees"),
):
    _UNITS |= dict.fromkeys(_names.split(), (_kind, _factor))
_DOSES = ("mass", "volume", "units", "pieces", "drops", "puffs", "spoons")
_UNITS_AND_TEENS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_WORDS: dict[str, int | Fraction] = {"once": 1, "twice": 2, "half": Fraction(1, 2)}
_WORDS |= {word: number for number, word in enumerate(_UNITS_AND_TEENS.split())}
_WORDS |= {word: 10 * number for number, word in enumerate(_TENS.split(), start=2)}

_VALUE = rf"(?:\d{{1,3}}(?:,\d{{3}})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+|(?:{'|'.join(_WORDS)})\b)"
_UNIT = "|".join(map(re.escape, sorted(_UNITS, key=len, reverse=True)))
_QUANTITY = re.compile(
    rf"(?<![\w.])(?<![a-z]-)(?P<value>{_VALUE})"
    rf"(?:\s*(?:-|–|—|to|or|and)\s*(?P<other>{_VALUE}))?"
    rf"(?:[\s-]*(?P<unit>{_UNIT})(?![a-z0-9])(?:\s*(?:/|per\s)\s*(?P<per>kg|dl|ml|l|m2)\b)?|(?!\w|\.\d))"
)
_LIST_MARKER = re.compile(r"^[ \t]*\(?\d{1,2}[.)](?=\s)", re.MULTILINE)


@dataclass(frozen=True)
class Quantity:
    """One number of a text.

    Attributes:
        text: as it stands, with its unit.
        number: as it stands.
        amount: in the smallest unit of its kind; the number where it has no unit.
        kind: what the unit measures, "mass" or "mass/kg" say; None without unit.
        spelled: whether it is written as a word.
    """

    text: str
    number: Fraction
    amount: Fraction
    kind: str | None
    spelled: bool

    @property
    def is_dose(self) -> bool:
        """Whether it is an amount of a drug: by mass, volume, international units, tablets, drops, puffs, spoons."""
        return self.kind is not None and self.kind.split("/")[0] in _DOSES


def quantities(text: str) -> list[Quantity]:
    """The numbers of a text in their order, those of a range one by one with the unit of both.

    1,000 is 1000 and 0.50 is 0.5; 1 g is 1,000 mg and a day 24 hours. Not counted: numbers that are part of a name
    (B12, COVID-19), ordinals (2nd), and the numbers of a list.
    """
    return list(_quantities(_LIST_MARKER.sub("", text)))


def unsupported(answer: str, reference: str, question: str) -> list[Quantity]:
    """The numbers of an answer that stand neither in its reference nor in the question, each once.

    A number with a unit needs the same amount there; one without, the same number with whatever unit. A number word
    counts in the answer only with a unit ("one of them" says nothing), and there always.
    """
    there = quantities(reference) + quantities(question)
    amounts = {(quantity.amount, quantity.kind) for quantity in there}
    numbers = {quantity.number for quantity in there}
    found: dict[str, Quantity] = {}
    for quantity in quantities(answer):
        if quantity.kind is None:
            supported = quantity.spelled or quantity.number in numbers
        else:
            supported = (quantity.amount, quantity.kind) in amounts
        if not supported:
            found.setdefault(quantity.text, quantity)
    return list(found.values())


def unsupported_numbers(answer: str, reference: str, question: str) -> list[str]:
    """As `unsupported`, each as it stands in the answer, with its unit."""
    return [quantity.text for quantity in unsupported(answer, reference, question)]


def _quantities(text: str) -> Iterator[Quantity]:
    """The numbers of a text that has no list markers."""
    for match in _QUANTITY.finditer(text.lower()):
        unit, per = match["unit"], match["per"]
        kind, factor = _UNITS[unit] if unit else (None, 1)
        if kind and per:
            kind = f"{kind}/{per}"
        for value in (match["value"], match["other"]):
            if value is not None:
                written = f"{value} {unit}{f'/{per}' if per else ''}" if unit else value
                number = _number(value)
                yield Quantity(written, number, number * factor, kind, value in _WORDS)


def _number(text: str) -> Fraction:
    """A number in digits or as a word."""
    return Fraction(_WORDS[text]) if text in _WORDS else Fraction(text.replace(",", ""))

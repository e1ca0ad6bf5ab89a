"""How open-instruct's eval/*/run_eval.py (commit f342459) read an answer."""

import re
import string
from collections import Counter

NUMBER = re.compile(r"[-+]?\d*\.\d+|\d+")
ANSWER = re.compile(r"[t|T]he answer is (.*?)\.")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def gsm8k(doc, results) -> dict[str, float]:
    """The last number of the answer, without the commas and the sign."""
    text, gold = (re.sub(r"(\d),(\d)", r"\1\2", text) for text in (results[0], doc["answer"].split("####")[1].strip()))
    return _match((NUMBER.findall(text) or [text])[-1], gold)


def bbh(doc, results) -> dict[str, float]:
    """What stands between the first "the answer is" and the next period, else the whole answer."""
    found = ANSWER.search(results[0])
    return _match((found[1] if found else results[0]).strip(), doc["target"])


def _match(answer: str, gold: str) -> dict[str, float]:
    return {"exact_match": float(_bare(answer) == _bare(gold))}


def _bare(text: str) -> str:
    return text.lower().translate(PUNCTUATION)


def tydiqa(doc, results) -> dict[str, float]:
    """SQuAD's metrics, which drop the English articles, in all languages."""
    answer, golds = _words(results[0]), [_words(gold) for gold in doc["answers"]]
    return {"exact_match": float(answer in golds), "f1": max(_f1(answer, gold) for gold in golds)}


def _words(text: str) -> list[str]:
    return re.sub(r"\b(a|an|the)\b", " ", _bare(text)).split()


def _f1(answer: list[str], gold: list[str]) -> float:
    shared = (Counter(answer) & Counter(gold)).total()
    return 2 * shared / (len(answer) + len(gold)) if shared else 0.0

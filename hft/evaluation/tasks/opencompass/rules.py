"""How OpenCompass (0.4.2 to 0.5.4) reads an answer; file and function of each rule are in its docstring."""

import ast
import re

# Its patterns for an option, in its order, without those for Chinese answers.
OPTION = [
    r"[\s:,]([ABCD])[,\.]?$",
    r"(?i)ANSWER\s*:\s*([ABCD])",
    r"[Tt]he answer is:?\s+\(?([ABCD])\)?",
    r"[Tt]he answer is:?\s+\(?\*?\*?([ABCD])\*?\*?\)?",
    r"[Tt]he answer is option:?\s+\(?([ABCD])\)?",
    r"[Tt]he correct answer is:?\s+\(?([ABCD])\)?",
    r"[Tt]he correct answer is option:?\s+\(?([ABCD])\)?",
    r"[Tt]he correct answer is:?.*?boxed{([ABCD])}",
    r"[Tt]he correct option is:?.*?boxed{([ABCD])}",
    r"[Tt]he correct answer option is:?.*?boxed{([ABCD])}",
    r"[Tt]he answer to the question is:?\s+\(?([ABCD])\)?",
    r"(\s|^)[ABCD][\s,:\.$]",
    r"1.\s?(.*?)$",
    r"1.\s?([ABCD])[.$]?$",
    r"([ABCD]):",
    r"([ABCD])",
]


def letter(doc, results) -> dict[str, float]:
    right = int(doc["answer"] if "answer" in doc else doc["label"])
    return {"acc": float(option(results[0]) == "ABCD"[right])}


def option(text: str) -> str | None:
    """utils/text_postprocessors.py, first_option_postprocess: the first pattern that finds an option decides."""
    text = text.strip()
    for pattern in OPTION:
        if found := re.search(pattern, text, re.DOTALL):
            for letter in "ABCD":
                if letter in (found[1] or found[0]):
                    return letter
    return None


def answers(dataset):
    """The right answers of DPR's rows, which are Python literals."""
    return dataset.map(lambda row: {"answers": ast.literal_eval(row["answers"])})


def nq(doc, results) -> dict[str, float]:
    """datasets/natural_question.py, NQEvaluator."""
    return _contains(doc, results[0], "answer is")


def triviaqa(doc, results) -> dict[str, float]:
    """datasets/triviaqa.py, TriviaQAEvaluator."""
    return _contains(doc, results[0], "answer is", "a:", "answer:")


def _contains(doc, text: str, *cues: str) -> dict[str, float]:
    """Whether a right answer is in the first line, after each cue's last occurrence."""
    text = text.strip().split("\n")[0].lower()
    for cue in cues:
        text = text.split(cue)[-1]
    return {"contains": float(any(_plain(answer).lower() in _plain(text) for answer in doc["answers"]))}


def _plain(text: str) -> str:
    """utils/text_postprocessors.py, general_postprocess: up to the first newline, period or comma."""
    text = re.sub(r"[^\w\s]", "", re.split(r"[\n.,]", text, maxsplit=1)[0])
    return re.sub(r"\s+", " ", re.sub(r"\b(a|an|the)\b", "", text, flags=re.IGNORECASE)).strip()


def bbh(doc, results) -> dict[str, float]:
    """datasets/bbh.py (0.4.2), bbh_mcq_postprocess where an option is right, else bbh_freeform_postprocess."""
    parts, gold = results[0].split("answer is "), doc["target"]
    text = parts[1].strip() if len(parts) > 1 else results[0]
    if re.fullmatch(r"\([A-Z]\)", gold):
        found = re.search(r"\(([A-Z])\)*", text) or re.search(r"([A-Z])", text)
        return {"exact_match": float(bool(found) and found[1] == gold[1])}
    text = text.split("\n")[0].strip().removesuffix(".").strip()
    bold = re.search(r"\*\*(.*?)\*\*", text)
    return {"exact_match": float((bold[1] if bold else text) == gold)}


def gsm8k(doc, results) -> dict[str, float]:
    """datasets/gsm8k.py, gsm8k_postprocess and Gsm8kEvaluator: the last number before another question."""
    numbers = re.findall(r"-?\d+\.\d+|-?\d+", results[0].split("Question:")[0])
    gold = doc["answer"].split("#### ")[1].replace(",", "")
    return {"exact_match": float(bool(numbers) and abs(float(numbers[-1]) - int(gold)) < 1e-6)}


def math(doc, results) -> dict[str, float]:
    """evaluator/math_evaluator.py, MATHVerifyEvaluator (since April 2025): math-verify on LaTeX, a box first."""
    from latex2sympy2_extended import NormalizationConfig
    from lm_eval.tasks.minerva_math.utils import last_boxed_only_string, remove_boxed
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    boxed = f"${remove_boxed(last_boxed_only_string(doc['solution']))}$"
    gold = parse(boxed, [LatexExtractionConfig(), ExprExtractionConfig()], extraction_mode="first_match")
    clean = NormalizationConfig(nits=False, malformed_operators=False, basic_latex=True, boxed="all", units=True)
    latex = LatexExtractionConfig(normalization_config=clean, boxed_match_priority=0, try_extract_without_anchor=False)
    answer = parse(results[0], [latex], extraction_mode="first_match")
    return {"exact_match": float(verify(answer, gold))}


def execution(doc, results) -> dict[str, float]:
    """datasets/livecodebench, extract_code_execution and evaluate_score.

    They run the function and compare its result with the answer; here both answers are read as literals.
    """
    text = (re.findall(r"\[PYTHON\](.*?)\[\/PYTHON\]", results[0], re.DOTALL) or [results[0]])[-1]
    text = text.split("==")[1].strip() if "==" in text else text
    text = text.split("[/ANSWER]" if "[/ANSWER]" in text else "\n")[0].strip()
    try:
        right = ast.literal_eval(text) == ast.literal_eval(doc["output"])
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # no literal
        right = False
    return {"pass@1": float(right)}

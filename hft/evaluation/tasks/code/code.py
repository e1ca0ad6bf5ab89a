"""Programs read from a model's answers, and pass@k of them."""

import ast
import math
import os
import re
import textwrap
import warnings
from concurrent.futures import ThreadPoolExecutor

from hft.evaluation import sandbox

# What ends a function that is continued: Codex's stops (arXiv 2107.03374) and the end of the code block it began in.
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n```")
BLOCK = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)
# A line at the margin with its decorators, and the lines after it that are indented or close a bracket.
STATEMENT = re.compile(r"(?:^@.*\n)*^[^\s)\]}].*(?:\n(?:[ \t)\]}].*)?)*", re.MULTILINE)
DEFINITIONS = (ast.Import, ast.ImportFrom, ast.Assign, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
INSTRUCTIONS = "hf://datasets/bigcode/humanevalpack/data/python/data/humanevalpack.jsonl"


def keep_all(resps, docs):
    """Every sample of a row, where lm-eval would keep the first."""
    return resps


def with_instructions(**_):
    """HumanEval with the instruction that HumanEvalPack has for each problem."""
    from datasets import load_dataset

    pack = load_dataset("json", data_files=INSTRUCTIONS, split="train")
    instructions = {row["task_id"].partition("/")[2]: row["instruction"] for row in pack}
    problems = load_dataset("openai/openai_humaneval")
    return problems.map(lambda row: {"instruction": instructions[row["task_id"].partition("/")[2]]})


def humaneval(doc, results) -> dict[str, float]:
    tests = f"\n{doc['test']}\ncheck({doc['entry_point']})"
    programs = [function_in(answer, doc["prompt"], doc["entry_point"]) + tests for answer in results[0]]
    return pass_at(programs, (1, 10))


def mbpp(doc, results) -> dict[str, float]:
    tests = "\n".join(doc["test_list"])
    return pass_at([f"{code_in(answer)}\n{tests}" for answer in results[0]], (1,))


def function_in(answer: str, prompt: str, name: str) -> str:
    """The program of an answer to the head of a function: the head continued, or a whole function instead of it."""
    head = re.compile(rf"^(async )?def {name}\b", re.MULTILINE)
    before = head.split(prompt)[0]  # what the function may need
    body = re.split("|".join(map(re.escape, STOPS)), answer)[0]
    if re.match(r"\n*[ \t]+\S", body) and parsed(prompt + body):
        return prompt + body
    blocks = [textwrap.dedent(block) for block in BLOCK.findall(answer)]
    for code in (*blocks, definitions(answer)):
        if head.search(code):
            return before + code
    return prompt + next((block for block in BLOCK.findall(answer) if parsed(prompt + block)), body)


def code_in(answer: str) -> str:
    """The program of an answer: what stands between [BEGIN] and [DONE], in a code block, or between other text."""
    text = re.split(r"\[?BEGIN\]?", answer, maxsplit=1)[-1]
    text = re.split(r"\[?DONE\]?", text)[0].strip()
    if text.startswith("'"):  # as in the examples
        text = text[1:].removesuffix("'")
    code, *_ = text.replace("\\_", "_").split("```")
    return definitions(code) or textwrap.dedent(next(iter(BLOCK.findall(text)), code))


def definitions(text: str) -> str:
    """A text if it is code, else the imports, functions, classes and constants in it; empty if it defines nothing."""
    code = text.strip()
    if not parsed(code):
        statements = ((statement, parsed(statement)) for statement in STATEMENT.findall(code))
        kept = (one for one, tree in statements if tree and all(isinstance(node, DEFINITIONS) for node in tree.body))
        code = "\n".join(kept)
    return code if re.search(r"^(async def|def|class)\b", code, re.MULTILINE) else ""


def parsed(code: str) -> ast.Module | None:
    """The syntax tree of code; None for text that is not Python."""
    try:
        with warnings.catch_warnings(action="ignore"):
            return ast.parse(code)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None


def pass_at(programs: list[str], ks: tuple[int, ...]) -> dict[str, float]:
    """The unbiased estimate of pass@k (arXiv 2107.03374, equation 1) from n samples, for each k <= n."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        correct = sum(pool.map(sandbox.passes, programs))
    n = len(programs)
    return {f"pass@{k}": 1 - math.comb(n - correct, k) / math.comb(n, k) for k in ks if k <= n}

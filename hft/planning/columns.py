"""Ways of training in columns: memory, FLOPs, what fits, GPU-hours."""

from tqdm import tqdm

from hft.planning.candidates import Candidate
from hft.planning.fit import SPARE
from hft.planning.memory import GIB, LABELS
from hft.text import aligned

NamedCells = list[tuple[str, list[str]]]


def memory_block(candidates: list[Candidate]) -> tuple[str, NamedCells]:
    """Memory by part, and the sum, also relative to the first candidate."""
    parts = [candidate.memory.parts() for candidate in candidates]
    names = [name for name in parts[0] if any(part[name] for part in parts)]
    totals = [candidate.memory.total for candidate in candidates]
    unit, size = ("GiB", GIB) if max(totals) >= GIB else ("MiB", 2**20)
    rows = [(LABELS.get(name, name), [f"{part[name] / size:.2f}" for part in parts]) for name in names]
    rows += [("peak, at most", [f"{total / size:.2f}" for total in totals]), _relative(totals)]
    return f"{unit} per device", rows


def flops_block(candidates: list[Candidate]) -> tuple[str, NamedCells]:
    """FLOPs per token by pass, and the sum, also relative to the first candidate."""
    steps = [candidate.step for candidate in candidates]
    totals = [step.flops / step.tokens for step in steps]
    unit, size = ("GFLOPs", 1e9) if max(totals) >= 1e8 else ("MFLOPs", 1e6)
    rows = []
    for name in ("forward", "backward", "recompute", "reference", "strategy"):
        flops = [getattr(step, name) for step in steps]
        cells = [f"{f / step.tokens / size:.2f}" for f, step in zip(flops, steps, strict=True)]
        rows += [(name, cells)] if any(flops) else []
    rows += [("sum", [f"{total / size:.2f}" for total in totals]), _relative(totals)]
    return f"{unit} per token", rows


def fitting_block(candidates: list[Candidate], available: float) -> tuple[str, NamedCells]:
    """Whether each fits as the recipe has it, the fewest layers that must be checkpointed, and its FLOPs with these."""
    whole = available / (1 - SPARE)
    fewest = [candidate.fewest(available) for candidate in candidates]
    first = candidates[0].step.flops
    best = [None if n is None else c.costs(range(n)).flops / first for c, n in zip(candidates, fewest, strict=True)]
    rows = [
        ("fits", ["yes" if c.memory.total <= available else "no" for c in candidates]),
        ("fewest checkpointed layers", ["none fits" if n is None else str(n) for n in fewest]),
        ("FLOPs with these, vs. fft", ["-" if ratio is None else f"{ratio:.3f}" for ratio in best]),
    ]
    return f"of {whole / GIB:.3g} GiB, {SPARE:.0%} reserved", rows


def hours_block(candidates: list[Candidate], tokens: int, tflops: float, mfu: float) -> tuple[str, NamedCells]:
    """GPU-hours for so many tokens at a fraction `mfu` of a GPU's peak."""
    steps = [candidate.step for candidate in candidates]
    hours = [step.flops / step.tokens * tokens / (tflops * 1e12 * mfu) / 3600 for step in steps]
    count = tqdm.format_sizeof(tokens).replace("G", "B")
    cells = [f"{h:,.0f}" if h >= 100 else f"{h:.2g}" for h in hours]
    return f"{count} tokens at {mfu:.0%} of {tflops:g} TFLOP/s", [("GPU-hours", cells)]


def in_columns(heads: list[str], blocks: list[tuple[str, NamedCells]]) -> str:
    """Blocks of rows, each below its title, in columns."""
    lines: list[str | list[str]] = []
    for title, rows in blocks:
        lines.append(f"{title}:" if lines else [f"{title}:", *heads])
        lines += [[f"  {name}", *cells] for name, cells in rows]
    return aligned(lines, left=1)


def _relative(values: list[float]) -> tuple[str, list[str]]:
    return "relative to fft", [f"{value / values[0]:.3f}" for value in values]

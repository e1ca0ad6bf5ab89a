"""`hft report`: a command line in, an exit status out."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from hft.errors import HFTError
from hft.machine import say


def report(arguments: Sequence[str]) -> int:
    """Compare runs, as one HTML page and as Markdown."""
    parser = argparse.ArgumentParser(prog="hft report", description="Compare runs, as HTML and as Markdown.")
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folder of a run, reset, merge or scored model")
    parser.add_argument("--out", default="report", help="folder for report.html, report.md and figures (%(default)s)")
    parser.add_argument("--report_to", choices=("none", "wandb"), default="none", help="log the page (%(default)s)")
    options = parser.parse_args(arguments)
    out = Path(options.out)
    if out.is_dir() and any(out.iterdir()) and not (out / "report.html").exists():
        raise HFTError(f"{out} holds other files than a report; name another folder with --out")

    from hft.reporting.collect import collect
    from hft.reporting.page import write_report
    from hft.reporting.sections import make_sections

    found = collect(options.runs)
    sections = make_sections(found)
    counts = [(sum(len(group.runs) for group in found.groups), f"runs of {', '.join(found.models)}")]
    counts += [(len(found.extras["matrix.json"]), "sequences of tasks")]
    paths = write_report(", ".join(f"{count} {what}" for count, what in counts if count), sections, out)
    if options.report_to != "none":
        tables = [table for section in sections for table in section.tables]
        say(log_report(out, {name: value for table in tables for name, value in table.numbers.items()}))
    say(*paths)
    return 0


def log_report(out: Path, numbers: dict[str, float]) -> str:
    """Log a report's page to wandb, numbers as its summary and the folder as an artifact, and say where."""
    import wandb

    from hft.runs.tracking import finish, open_run, upload

    run, where = open_run(name=out.resolve().name, job_type="report")
    run.log({"report": wandb.Html((out / "report.html").read_text(encoding="utf-8"), inject=False)})
    run.summary.update(numbers)
    upload(out, kind="report")
    finish()
    return where

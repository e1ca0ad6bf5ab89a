"""MkDocs: pages of the site that are made, or lie outside docs/.

A page outside docs/ keeps its path; README.md is the home page. Whatever a page links to becomes a page too: Markdown
as it is, other text as a listing, a folder as a list of its files. So every link works without a network, and a broken
link fails the build.
"""

import json
import os
import re
from pathlib import Path, PurePosixPath

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()([^)\s:#]+)(#[^)\s]*)?(?=\))")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json", ".sh": "bash", ".toml": "toml"}
IMAGES = (".png", ".svg")
START = ("README.md", "CONTRIBUTING.md", "recipes/README.md", "results")
SOURCES = {}  # by page of the site: where it is in the repository


def on_config(config):
    """A page that is yet to be written has no entry."""
    for section in (one for entry in config.nav for one in entry.values() if isinstance(one, list)):
        if not exists("docs/which-method.md"):
            section[:] = [entry for entry in section if [*entry.values()] != ["which-method.md"]]
    config.watch += [str(ROOT / "README.md"), str(ROOT / "recipes")]
    return config


def on_files(files, config):
    """Add the pages that are made, and whatever pages link to, from page to page."""
    files.append(File.generated(config, "methods.md", content=methods_page()))
    waiting = [*START, *(f"docs/{file.src_uri}" for file in files.documentation_pages() if not file.generated_by)]
    while waiting:
        source = waiting.pop()
        uri = site_uri(source)
        if uri in SOURCES or not exists(source):
            continue
        SOURCES[uri] = f"{source}/README.md" if (ROOT / source).is_dir() else source
        if not files.get_file_from_path(uri):
            files.append(made(config, source, uri))
        if uri.endswith(".md"):
            waiting += [
                target(SOURCES[uri], link[1]) for link in LINK.finditer(files.get_file_from_path(uri).content_string)
            ]
    return files


def on_page_markdown(markdown, page, config, files):
    """Point the links of a page, which are those of the repository, to pages of the site."""
    folder = PurePosixPath(page.file.src_uri).parent

    def rewritten(link):
        found = target(SOURCES.get(page.file.src_uri, ""), link[1])
        return os.path.relpath(site_uri(found), folder) + (link[2] or "") if exists(found) else link[0]

    return LINK.sub(rewritten, markdown)


def on_page_content(html, **_):
    """Long keys in tables may break after an underscore; a flag does not break after its first hyphens."""
    html = re.sub(r"<td>.*?</td>", lambda cell: re.sub("_(?=[a-z])(?![^<]*>)", "_<wbr>", cell[0]), html)
    return re.sub(r"(?<=<code>)[^<]+", lambda code: re.sub(r"--\w", r'<span class="flag">\g<0></span>', code[0]), html)


def exists(path):
    return (ROOT / path).exists()


def target(source, link):
    """What a link in a file of the repository points to, from the root."""
    return os.path.normpath(PurePosixPath(source).parent / link)


def site_uri(source):
    """Where a file or folder of the repository is on the site."""
    path = ROOT / source
    if path.is_dir():
        return f"{source}/README.md"
    inside = source.removeprefix("docs/")
    if source == "README.md":
        return "index.md"
    return inside if source.endswith((".md", *IMAGES)) else f"{inside}.md"


def made(config, source, uri):
    """The file of the site for one outside docs/."""
    path = ROOT / source
    if path.is_dir():
        shown = [one for one in sorted(path.iterdir()) if one.suffix not in IMAGES]
        rows = [f"- [{title(one)}]({one.name})" for one in shown]
        return File.generated(config, uri, content="\n".join([f"# {source}", "", *rows, ""]))
    if path.suffix in (".md", *IMAGES):
        return File.generated(config, uri, abs_src_path=str(path))
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        return File.generated(config, uri, content="\n\n".join(map(cell_of, json.loads(text)["cells"])))
    return File.generated(config, uri, content=f"# {source}\n\n````{LANGUAGES.get(path.suffix, '')}\n{text}\n````\n")


def cell_of(cell):
    """A cell of a notebook as Markdown."""
    text = "".join(cell["source"])
    return f"```python\n{text}\n```" if cell["cell_type"] == "code" else text


def title(path):
    """The heading of a page, or the name of another file or folder."""
    return path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ") if path.suffix == ".md" else path.name


def methods_page():
    """A row per method, from the comment on top of its file, and the files."""
    rows, listings = [], []
    for path in sorted((ROOT / "recipes/methods").glob("*.yaml")):
        text = re.sub("# yaml-language-server:.*\n", "", path.read_text(encoding="utf-8"))
        comment = " ".join(re.match(r"(?:#.*\n)*", text)[0].replace("#", " ").split())
        sentence = re.split(
            r"(?<=\.)(?<!al\.) ", re.sub(r" \([^()]*\b(arXiv|[Ss]ection|Tables?)\b[^()]*\)", "", comment)
        )[0]
        papers = dict.fromkeys(re.findall(r"arXiv (\d{4}\.\d{5})", comment))
        sources = [f"[{number}](https://arxiv.org/abs/{number})" for number in papers]
        sources += dict.fromkeys(
            re.findall(r"(?:Tables?|Figure|section) \d+(?:\.\d+)*(?:(?:, | and )\d+)*|A\.\d+\.\d+", comment)
        )
        rows.append(f"| [{path.stem}](#{path.stem}) | {sentence.rstrip('.')} | {', '.join(sources)} |")
        listings.append(f"## {path.stem}\n\n```yaml\n{text}```\n")
    intro = (
        "A run is a recipe plus a method: `hft sft --config RECIPE METHOD`. A method is one YAML file. Tables, figures "
        "and sections are those of [HFT's paper](https://arxiv.org/abs/2404.18466)."
    )
    head = ["# Methods", "", intro, "", "| method | what it does | source |", "| --- | --- | --- |"]
    return "\n".join([*head, *rows, "", *listings])

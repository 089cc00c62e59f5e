"""The pages of the site that are not in docs/: a hook of mkdocs (mkdocs.yml), for `make docs`.

Pages from elsewhere in the repository are added under their own paths, README.md as the front page. The API reference
is made from `REFERENCE`. A link to a source file leads to a page that shows the file. So every link of the repository
works in the site, and the strict build checks it.
"""

from __future__ import annotations

import pathlib
import posixpath
import re
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = pathlib.Path(__file__).resolve().parent.parent
OUTSIDE = ("CONTRIBUTING.md", "CHANGELOG.md", "tests/parity/README.md", "tests/checkpoints/README.md")
# heading -> (what it is for, public names)
REFERENCE = {
    "The model": ("Loading and calling a model.", ["jaxmoe.Qwen3MoeForCausalLM"]),
    "Configs": (
        "What a model and its adapters look like.",
        ["jaxmoe.config.Qwen3MoeConfig", "jaxmoe.config.RopeParameters", "jaxmoe.LoraConfig"],
    ),
    "Data": (
        "Records and tokenizers.",
        ["jaxmoe.data.Record", "jaxmoe.data.load_tokenizer", "jaxmoe.data.read_records", "jaxmoe.data.tokenize_record"],
    ),
    "Training": (
        "`python -m jaxmoe.train` and `python -m jaxmoe.routing ab` from Python.",
        ["jaxmoe.train.TrainConfig", "jaxmoe.train.train", "jaxmoe.train.paired.run_pairs"],
    ),
    "Generation": (
        "`python -m jaxmoe.generate` from Python.",
        ["jaxmoe.generate.Generator", "jaxmoe.generate.Sampling"],
    ),
    "Routing": (
        "`python -m jaxmoe.routing` from Python: capture, compare, summarise and draw.",
        [
            "jaxmoe.routing.text.read_text",
            "jaxmoe.routing.capture.capture",
            "jaxmoe.routing.generation.capture_generation",
            "jaxmoe.routing.summary.summarise",
            "jaxmoe.routing.compare.compare",
            "jaxmoe.routing.compare.compare_domains",
            "jaxmoe.routing.imported.import_experts",
            "jaxmoe.routing.plots",
            "jaxmoe.routing.pruning",
            "jaxmoe.routing.figures.Lines",
            "jaxmoe.routing.figures.Series",
            "jaxmoe.routing.figures.show",
        ],
    ),
    "Interventions": ("Experts removed or forced.", ["jaxmoe.control.interventions.Intervention"]),
    "Routing metrics": ("Pure functions over arrays.", ["jaxmoe.routing.metrics"]),
    "Captures": (
        "Captured routing on disk.",
        ["captures.Capture", "captures.CaptureWriter", "captures.LabelledText", "captures.tokenizer_digest"],
    ),
    "The reference in PyTorch": (
        "transformers' models with patched forwards, LoRA and 4-bit weights.",
        ["torch_ref.FastQwen3MoeModel", "torch_ref.FastQwen3Model"],
    ),
}
_LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
_CODE = {".py": "python", ".sh": "bash", ".toml": "toml", ".yml": "yaml", ".json": "json"}
_shown: set[str] = set()  # paths of the source files to which pages link


@event_priority(100)  # before mkdocs-jupyter, which uses the notebooks that it finds then
def on_files(files: Files, config: Any) -> Files:
    """Adds the pages outside docs/, the reference, and a page for each source file that a page links to."""
    places = (str(ROOT), config.site_dir, config.use_directory_urls)
    notebooks = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "notebooks").glob("*.ipynb"))
    for path in (*OUTSIDE, *notebooks):
        files.append(File(path, *places))
    files.append(File.generated(config, "index.md", abs_src_path=str(ROOT / "README.md")))
    files.append(File.generated(config, "reference.md", content=reference()))
    known = {_of_repository(file.src_uri): file.src_uri for file in files}
    for file in [file for file in files if file.src_uri.endswith(".md") and file.src_uri != "reference.md"]:
        page = _of_repository(file.src_uri)
        for match in _LINK.finditer((ROOT / page).read_text(encoding="utf-8")):
            target = _target(page, match[2])
            if target is not None and target not in known and (ROOT / target).is_file():
                _shown.add(target)
    for path in sorted(_shown):
        files.append(File.generated(config, f"source/{path}.md", content=_source_page(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turns the page's links within the repository into links within the site."""
    here = page.file.src_uri
    if here.startswith("source/") or here == "reference.md" or here.endswith(".ipynb"):
        return markdown

    def changed(match: re.Match[str]) -> str:
        target = _target(_of_repository(here), match[2])
        if target is None:
            return match[0]
        if target == "notebooks":
            target = "notebooks/1_quick_start.ipynb"
        uri = f"source/{target}.md" if target in _shown else _of_site(target)
        return f"{match[1]}{posixpath.relpath(uri, posixpath.dirname(here) or '.')}{match[3] or ''}{match[4]}"

    return _LINK.sub(changed, markdown)


def reference() -> str:
    """The API reference, one heading for each group of names."""
    parts = ["# API reference\n\nThese names are public. Everything else may move.\n"]
    for title, (text, names) in REFERENCE.items():
        parts.append(f"## {title}\n\n{text}\n\n" + "\n".join(f"::: {name}\n" for name in names))
    return "\n".join(parts)


def _of_repository(uri: str) -> str:
    """A page's path in the repository."""
    if uri == "index.md":
        return "README.md"
    return uri if (ROOT / uri).exists() and not (ROOT / "docs" / uri).exists() else f"docs/{uri}"


def _of_site(path: str) -> str:
    """A file's path in the site's sources."""
    return "index.md" if path == "README.md" else path.removeprefix("docs/")


def _target(page: str, link: str) -> str | None:
    """The target of a link on `page`, as a path in the repository; None if the target is outside it."""
    if "://" in link or link.startswith("mailto:"):
        return None
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), link))


def _source_page(path: str) -> str:
    text = (ROOT / path).read_text(encoding="utf-8")
    return f"# {path}\n\n````{_CODE.get(pathlib.PurePath(path).suffix, 'text')}\n{text}\n````\n"

"""Adds pages to the site: the README as the first one, and the reference, which is made from the code."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from reference import pages  # MkDocs imports this file with its folder on the path

ROOT = Path(__file__).parents[1]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are not files of docs/."""
    readme = re.sub(r"\]\(docs/", "](", (ROOT / "README.md").read_text())
    for path, text in {"index.md": readme, **pages()}.items():
        files.append(File.generated(config, path, content=text))
    return files

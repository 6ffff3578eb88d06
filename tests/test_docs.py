"""The reference has a line for everything that a user can type, and links lead somewhere."""

import re
from pathlib import Path

import pytest
from make_recipe_golden import recipes

from cnx2_jax.cli import VERBS, main
from cnx2_jax.configuration import defaults, flatten
from cnx2_jax.data.sources import KINDS
from cnx2_jax.launch.backends import BACKENDS
from cnx2_jax.tasks import TASKS
from docs import reference

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
TEXTS = [*PAGES, *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"))]
KEY_ROW = r"^\| <code>{}</code> \| \S.* \| .* \| .* \|$"
# Files that the repository holds, named as code; a name in capitals stands for one of your own.
NAMED_FILE = re.compile(r"`((?:cnx2_jax|configs|experiments|tests|docs)/[\w./]*)`")


@pytest.fixture(scope="module")
def pages():
    return reference.pages()


def section(page, heading):
    """Returns the text between a heading of level 2 and the next one."""
    return page.split(f"\n## {heading}\n")[1].split("\n## ")[0]


@pytest.mark.parametrize(
    "command", [*([verb] for verb in VERBS), *(["launch", name, "run"] for name in BACKENDS)], ids=" ".join
)
def test_every_verb_and_option_is_in_the_reference(pages, command, capsys):
    with pytest.raises(SystemExit):
        main([*command, "--help"])
    options = set(re.findall(r"^  (--[a-z-]+)", capsys.readouterr().out, re.MULTILINE))
    text = section(pages["reference/verbs.md"], f"cnx2 {command[0]}")
    for name in command[1:]:
        (text,) = re.findall(rf"^##+ .*\b{name}$(.*?)(?:^### |\Z)", text, re.MULTILINE | re.DOTALL)
    assert {option for option in options if f"<code>{option}" not in text} == set()
    assert options or command == ["launch"]


@pytest.mark.parametrize("task", TASKS)
def test_every_key_is_in_the_reference_with_a_meaning(pages, task):
    page = pages["reference/keys.md"]
    rows = page.split("\n## The task ")[0] + section(page, f"The task {task}")
    for key in flatten(defaults(task)):
        cell = reference.code(key).removeprefix("<code>").removesuffix("</code>")
        assert re.search(KEY_ROW.format(re.escape(cell)), rows, re.MULTILINE), key


def test_a_key_without_a_comment_is_an_error(monkeypatch):
    monkeypatch.setattr(reference, "comments", lambda function, root, prefix: {"seed": ""})
    with pytest.raises(ValueError, match="config key 'seed' has no comment"):
        reference.keys_page()


def test_keys_of_functions_that_a_task_calls_are_read():
    found = reference.comments(TASKS["segment"].add_keys, "config", "")
    assert found["data.ignore"] == "the value in masks of pixels that have no class"
    assert found["auxiliary_weight"] == "of the auxiliary head's loss"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_every_recipe_is_in_the_reference(pages, path):
    text = section(pages["reference/recipes.md"], path.stem)
    missing = [name for name in recipes(path) if reference.code(f"{path.stem}:{name}") not in text]
    assert missing == []


def test_docstrings_become_markdown():
    text = "Line.\n\n  cnx2 train --x \\\n      --y\n\nSee docs/data.md:\n- one\n  more\n- two\n"
    assert reference.markdown(text) == (
        "Line.\n\n```text\ncnx2 train --x \\\n    --y\n```\n\n"
        "See [docs/data.md](../data.md):\n\n- one\n    more\n- two"
    )


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_links_and_named_files_exist(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if re.match(r"https?:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.is_file(), link
        # The site holds nothing else, so a page names other files as code.
        assert path not in PAGES or target.is_relative_to(ROOT / "docs"), link
        assert not anchor or anchor in anchors(target.read_text()), link
    for name in NAMED_FILE.findall(text):
        assert (ROOT / name).exists() or re.search("[A-Z]{2}", name), name


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_lists_follow_an_empty_line(path):
    # The repository's web view needs none, but MkDocs takes such a list for part of the paragraph.
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert re.findall(r"^(?![-#]|\d+\. |  ).+\n- .*", text, re.MULTILINE) == []


def anchors(text):
    """Returns the anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    listed = re.findall(r"(\S+\.md)$", navigation, re.MULTILINE)
    assert sorted(listed) == sorted([*(page.name for page in PAGES), "index.md", *reference.pages()])


def test_every_source_is_on_the_page_about_data():
    text = (ROOT / "docs" / "data.md").read_text()
    assert [kind for kind in KINDS if not re.search(rf"^\| `{kind}\b", text, re.MULTILINE)] == []


def test_the_citation_has_the_version():
    version = re.search(r"^version = (.+)$", (ROOT / "setup.cfg").read_text(), re.MULTILINE)[1]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()

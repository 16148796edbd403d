"""What README and docs say is so: commands run, and those that cannot are parsed; recipes,
settings, files, links and error messages exist.

A command runs in a folder where `recipes/quickstart.yaml` is a small recipe. A block that cannot
run has a comment above it: `<!-- not run: why -->`.
"""

import ast
import contextlib
import json
import os
import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

from dpq_core.convnet.recipe import ConvRecipe, load_conv_recipe
from dpq_core.recipe import (
    ExecutionSection,
    RecipeError,
    load_recipe,
    parse_recipe,
    read_recipe,
    validated,
)
from flows.cli.main import app
from flows.deployments.form import Asked

REPOSITORY = Path(__file__).parents[2]
PAGES = [
    REPOSITORY / "README.md",
    REPOSITORY / "CONTRIBUTING.md",
    *sorted((REPOSITORY / "docs").glob("*.md")),
]
QUICKSTART = REPOSITORY / "recipes" / "quickstart.yaml"
PACKAGES = ("dpq_core", "infra", "tasks", "flows")

_FENCE = re.compile(r"(?:<!-- not run: (.+) -->\n)?^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\(([^)#\s]*)(?:#([\w-]+))?\)")
_FOLDERS = "recipes|examples|docs|tests|infra|tasks|flows|dpq_core"
_PATH = re.compile(rf"(?<![\w/.-])(?:{_FOLDERS})/[\w./-]*[\w/]")


@dataclass(frozen=True)
class Block:
    language: str
    text: str
    not_run: str  # why, or nothing

    def lines(self):
        """Commands, continued lines joined."""
        joined = self.text.replace("\\\n", " ").splitlines()
        return [words for line in joined if (words := shlex.split(line, comments=True))]


def blocks(page, language):
    found = [Block(m[2], m[3], m[1] or "") for m in _FENCE.finditer(page.read_text("utf-8"))]
    return [block for block in found if block.language == language]


def commands(page, program):
    """Every call of a program in a page's blocks, without its name."""
    lines = [words for block in blocks(page, "sh") for words in block.lines()]
    return [words[1:] for words in lines if words[0] == program]


def mentions(page, program):
    """The same, of code within the text: `dpq store gc [--dry-run]`."""
    text = _FENCE.sub("", page.read_text("utf-8"))
    spans = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)
    words = [re.sub(r"[\[\]…]", "", span).split() for span in spans]
    return [each[1:] for each in words if each[:1] == [program] and len(each) > 1]


def named(page):
    return page.relative_to(REPOSITORY).as_posix()


def resolve(words):
    """A sub-command and what is left for it."""
    found, left = typer.main.get_command(app), list(words)
    while left and (known := getattr(found, "commands", None)):
        unnamed = found.name == "convnet" and left[0] not in known
        name = "release" if unnamed else left.pop(0)
        assert name in known, f"dpq {' '.join(words)}"
        found = known[name]
    return found, left


@pytest.fixture(scope="module")
def sandbox(services_home, tmp_path_factory, content, brief):
    """A folder to run commands in, after one release of the small recipe."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "recipes").mkdir()
    for path in (REPOSITORY / "recipes").glob("*.yaml"):
        (folder / "recipes" / path.name).symlink_to(path)
    (folder / "recipes" / QUICKSTART.name).unlink()
    name = load_recipe(QUICKSTART).registered_name
    own = [brief, f"registry.name={name}", f"execution.store={ExecutionSection().store}"]
    small = folder / "recipes" / QUICKSTART.name
    small.write_text(json.dumps(content))  # JSON is YAML
    small.write_text(json.dumps(read_recipe(small, own)))
    with contextlib.chdir(folder):
        done = CliRunner().invoke(app, ["release", f"recipes/{QUICKSTART.name}", "--json"])
        assert done.exit_code == 0, done.stderr
        yield {**os.environ, "CHECKPOINT": json.loads(done.stdout)["checkpoint"]}


@pytest.mark.parametrize(
    "page", [p for p in PAGES if any(not b.not_run for b in blocks(p, "sh"))], ids=named
)
def test_commands_run(page, sandbox):
    for block in blocks(page, "sh"):
        for program, *words in [] if block.not_run else block.lines():
            given = [re.sub(r"\$(\w+)", lambda match: sandbox[match[1]], word) for word in words]
            if program == "dpq":
                done = CliRunner().invoke(app, given)
                assert done.exit_code == 0, f"dpq {' '.join(given)}: {done.stderr}"
            elif program == "make":  # it is this that runs
                subprocess.run(["make", "--dry-run", *given], cwd=REPOSITORY, check=True)
            else:
                assert re.fullmatch(r"\w+=…", program), f"{named(page)}: how to run {program}?"
                assert program[:-2] in sandbox


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_commands_options_and_settings_exist(page):
    for words in commands(page, "dpq"):
        command, left = resolve(words)
        parameters = command.make_context(command.name, left).params
        named_recipe = Path(parameters.get("recipe") or QUICKSTART)
        recipe = named_recipe if named_recipe.is_file() else QUICKSTART
        given = parameters.get("overrides") or parameters.get("settings") or []
        convnet = "convnet" in words and "recipe" in parameters
        (load_conv_recipe if convnet else load_recipe)(REPOSITORY / recipe, given)
    for words in mentions(page, "dpq"):
        for alternative in words[0].split("|"):
            command, left = resolve([alternative, *words[1:]])
            known = {option for parameter in command.params for option in parameter.opts}
            assert {word for word in left if word.startswith("--")} <= known, words
    targets = re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    for words in mentions(page, "make"):
        assert words[0] in targets


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_recipes_are_valid(page):
    for block in blocks(page, "yaml"):
        content = yaml.safe_load(block.text)
        if "watch" in content:
            assert [Asked(**entry) for entry in content["watch"]]
        elif "network" in content:
            validated(ConvRecipe, content, named(page))
        else:
            parse_recipe({**read_recipe(QUICKSTART), **content}, named(page))


def anchors(page):
    titles = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_and_files_exist(page):
    text = page.read_text("utf-8")
    for target, anchor in _LINK.findall(text):
        if "://" in target:
            continue
        path = page.parent / target if target else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), f"{target}#{anchor}"
    for path in _PATH.findall(text):
        assert (REPOSITORY / path).exists(), path


def said(node):
    """A string as the code has it, `…` for what is filled in."""
    if isinstance(node, ast.JoinedStr):
        return "".join(said(part) for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "…"


def test_error_messages_are_those_of_the_code():
    files = [path for package in PACKAGES for path in (REPOSITORY / package).rglob("*.py")]
    nodes = [node for path in files for node in ast.walk(ast.parse(path.read_text("utf-8")))]
    known = {said(node) for node in nodes if isinstance(node, ast.JoinedStr | ast.Constant)}
    with pytest.raises(RecipeError) as pydantic:
        parse_recipe({**read_recipe(QUICKSTART), "no_such": 1})
    known.add(str(pydantic.value))
    page = (REPOSITORY / "docs" / "troubleshooting.md").read_text("utf-8")
    heads = re.findall(r"^- (`.+?`):", page, re.MULTILINE)
    spans = [span for head in heads for span in re.findall(r"``(.+?)``|`([^`]+)`", head)]
    messages = ["".join(span).strip() for span in spans]
    assert len(messages) > 30
    missing = [each for each in messages if not any(each in text for text in known)]
    assert not missing

"""The documentation is correct: its code runs and prints the documented output, and its commands and files exist."""

import contextlib
import importlib
import inspect
import io
import re
import shlex
from pathlib import Path

import pytest
import torch

import pruneattn

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(ROOT.joinpath("docs").rglob("*.md"))
TEXTS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in [*PAGES, ROOT / "README.md"]}
WORDS = ("yes", "no", "up", "down", "left", "right")  # of own-data.md
_BLOCK = re.compile(r"^```(\w+)(.*)\n((?:.*\n)*?)```$", re.MULTILINE)
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")


def blocks_of(name):
    """``(language, title, text)`` of a page's fenced blocks."""
    return [(block[1], block[2].strip(), block[3]) for block in _BLOCK.finditer(TEXTS[name])]


def examples_of(name):
    """``(code, output)`` of a page's Python blocks; output is None where no text block follows."""
    blocks = blocks_of(name)
    return [
        (text, following[2] if following[0] == "text" else None)
        for (language, title, text), following in zip(blocks, [*blocks[1:], ("", "", "")])
        if language == "python" and not title
    ]


def run(name):
    """Run a page's examples one after the other, as a reader would; yields ``(expected output, output)``."""
    names = {}
    for code, expected in examples_of(name):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, name, "exec"), names)
        yield expected, printed.getvalue()


def assert_same(expected, printed):
    """Words are equal, and numbers are equal up to rounding: kernels of other machines add in another order."""
    assert _NUMBER.sub("#", printed) == _NUMBER.sub("#", expected), f"printed:\n{printed}"
    numbers = [[float(number) for number in _NUMBER.findall(text)] for text in (printed, expected)]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-2, abs=1e-3), f"printed:\n{printed}"


@pytest.mark.parametrize("name", [name for name in TEXTS if name.startswith("docs/") and examples_of(name)])
def test_examples(name, tmp_path, monkeypatch, request):
    code = "".join(code for code, _ in examples_of(name))
    for package in ("timm", "transformers", "onnxruntime"):
        if f"import {package}" in code or f"from {package}" in code:
            pytest.importorskip(package)
    if "esc10/" in code or '"words"' in code:
        data = request.getfixturevalue("real_audio")
        (tmp_path / "esc10").symlink_to(data / "esc10")
        (tmp_path / "words").mkdir()
        for word in WORDS:
            (tmp_path / "words" / word).symlink_to(data / "speech_commands_ar" / "audio" / word)
    (tmp_path / "bench").symlink_to(ROOT / "bench")
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        for expected, printed in run(name):
            assert_same(expected or "", printed)


def quotations():
    for name in TEXTS:
        for _, title, text in blocks_of(name):
            if title:
                yield pytest.param(name, title, text, id=f"{name}: {text.splitlines()[0]}")


@pytest.mark.parametrize("name, title, text", list(quotations()))
def test_quoted_code_is_in_its_file(name, title, text):
    path = re.fullmatch(r'title="(.+)"', title)[1]
    assert text in (ROOT / path).read_text(encoding="utf-8"), f"{name}: not in {path}:\n{text}"


def commands_of(name):
    """A page's shell commands as lists of words. Loops have their first value, other variables are 1."""
    for language, _, text in blocks_of(name):
        if language == "bash":
            text = text.replace("\\\n", " ")
            variables = re.findall(r'^(\w+)="([^"]*)"', text, re.MULTILINE)
            variables = dict(variables + re.findall(r"^for (\w+) in (\S+)", text, re.MULTILINE))
            for line in text.splitlines():
                line = re.sub(r"\$(\w+)", lambda found, values=variables: values.get(found[1], "1"), line)
                yield shlex.split(line, comments=True)


COMMANDS = {name: f"pruneattn.{name}" for name in ("train", "evaluate", "predict", "export", "convert", "data")}
COMMANDS["analyze"] = "pruneattn.analysis"


def python_commands():
    """Page, module or script, and arguments of the commands of this package."""
    for name in TEXTS:
        for words in commands_of(name):
            if words[:1] == ["pruneattn"] and len(words) > 1 and words[1] in COMMANDS:
                program, *arguments = words[1:]
                program = COMMANDS[program]
            elif "python" in words:
                program, *arguments = words[words.index("python") + 1 :]
                if program == "-m":
                    program, *arguments = arguments
            else:
                continue
            if "--" in arguments:  # the arguments after it are those of training
                cut = arguments.index("--")
                yield pytest.param(name, "pruneattn.train", arguments[cut + 1 :], id=f"{name}: {program} --")
                arguments = arguments[:cut]
            if program.startswith(("pruneattn.", "python/")):
                yield pytest.param(name, program, arguments, id=f"{name}: {program}")


@pytest.mark.parametrize("name, program, arguments", list(python_commands()))
def test_commands_take_these_options(name, program, arguments, load_file, capsys):
    if program.endswith(".py"):
        if "def main(" not in (ROOT / program).read_text():
            return  # a script without options, which loading it would run
        try:
            main = load_file(ROOT / program).main
        except SystemExit as error:  # the example needs a library that is optional
            if "is not installed" not in str(error):
                raise
            pytest.skip(str(error))
    else:
        module = importlib.import_module(program)
        main = getattr(module, "main", None) or importlib.import_module(f"{program}.__main__").main
    if not inspect.signature(main).parameters:
        return  # takes no options
    # Parsers read from left to right: they check values before they reach --help, but not unknown options.
    with pytest.raises(SystemExit) as left:
        main([*arguments, "--help"])
    printed = capsys.readouterr()
    assert left.value.code == 0, printed.err
    for option in (word for word in arguments if word.startswith("--")):
        assert re.search(rf"(?<![\w-]){option}(?![\w-])", printed.out), f"{option} is not an option of {program}"


def test_make_targets_exist():
    targets = re.findall(r"^([\w-]+):", ROOT.joinpath("Makefile").read_text(), re.MULTILINE)
    named = {words[1] for name in TEXTS for words in commands_of(name) if words[:1] == ["make"]}
    named |= {target for text in TEXTS.values() for target in re.findall(r"`make ([\w-]+)`", text)}
    assert named and named <= {*targets}


@pytest.mark.parametrize("name", TEXTS)
def test_named_files_exist(name):
    paths = re.findall(r"`((?:\.ci|bench|csrc|docs|pruneattn|python|tests|tools)/[\w./-]+)`", TEXTS[name])
    assert not [path for path in paths if "X." not in path and not (ROOT / path).exists()]


PACKAGES = (pruneattn, pruneattn.ops, pruneattn.data, pruneattn.adapters)


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_reference_is_complete(package):
    text = "".join(text for name, text in TEXTS.items() if name.startswith("docs/api/"))
    described = {*re.findall(r"^::: (\S+)$", text, re.MULTILINE)}
    names = {*package.__all__} - {*pruneattn._SUBMODULES}
    assert not [name for name in names if not {f"{package.__name__}.{name}", f"pruneattn.{name}"} & described]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_documented_arguments_are_taken(package):
    for name in package.__all__:
        thing = getattr(package, name)
        section = re.search(r"^Args:\n((?:    .*\n|\n)+)", inspect.getdoc(thing) or "", re.MULTILINE)
        if section and callable(thing):
            described = re.findall(r"^    (\w+(?:, \w+)*):", section[1], re.MULTILINE)
            described = [argument for names in described for argument in names.split(", ")]
            assert {*described} <= {*inspect.signature(thing).parameters}, name


def test_drawings_equal_the_output_of_their_script(load_file):
    for name, draw in load_file(ROOT / "docs/tools/drawings.py").DRAWINGS.items():
        there = (ROOT / f"docs/figures/{name}.svg").read_text(encoding="utf-8")
        assert there == draw().svg(), "run python docs/tools/drawings.py"


def test_sections_of_the_readme_are_complete(load_file):
    section = load_file(ROOT / "docs/tools/hooks.py").readme_section
    headings = [heading for text in TEXTS.values() for heading in re.findall(r"<!-- readme: (.+) -->", text)]
    for heading in headings:
        text = section(heading)
        assert text and text.count("```") % 2 == 0 and not re.match(r"#+ ", text)
        after = TEXTS["README.md"].partition(text)[2].lstrip()
        assert not after or after.startswith("#"), f"{heading}: cut short"
    assert headings

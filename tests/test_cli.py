"""The command ``pruneattn``, and the options that the commands share."""

import argparse
import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pruneattn
from pruneattn import __main__ as command
from pruneattn.cli import CommandParser, add_keep_rate_option, add_keep_rates_option
from pruneattn.constants import VERSION

PACKAGE = Path(pruneattn.__file__).parent
#: Its options come from the fields of dataclasses. A separate parser reads --model and --dataset first.
GENERATED = PACKAGE / "training" / "options.py"


def leave(capsys, *words):
    """Exit code, standard output and standard error of the command."""
    with pytest.raises(SystemExit) as leaving:
        command.main(words)
    printed = capsys.readouterr()
    return leaving.value.code, printed.out, printed.err


def test_help_has_one_line_for_each_command(capsys):
    code, out, _ = leave(capsys, "--help")
    lines = out.splitlines()
    assert code == 0
    for name, text in command.COMMANDS.items():
        assert [line for line in lines if line.split()[:1] == [name]] == [f"    {name:<10}{text}"]


def test_version(capsys):
    assert leave(capsys, "--version") == (0, f"pruneattn {VERSION}\n", "")
    assert pruneattn.__version__ == VERSION


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("evalute", " (did you mean 'evaluate'?)"),
        ("Train", " (did you mean 'train'?)"),
        ("analyse", " (did you mean 'analyze'?)"),
        ("frobnicate", ""),
        ("", ""),
    ],
)
def test_an_unknown_command_is_one_line_with_the_nearest_name(capsys, word, hint):
    message = f"error: unknown command {word!r}{hint}: choose one of {', '.join(command.COMMANDS)}"
    assert leave(capsys, word, "--help") == (message, "", "")


def test_without_a_command(capsys):
    code, _, err = leave(capsys)
    assert code == 2 and "COMMAND" in err


@pytest.mark.parametrize("name", sorted(command.COMMANDS))
def test_each_command_explains_its_options(capsys, name):
    code, out, _ = leave(capsys, name, "--help")
    assert code == 0 and out.startswith(f"usage: pruneattn {name} ")


def test_the_command_runs_the_main_function_of_the_module(capsys, monkeypatch):
    from pruneattn import evaluate

    seen = []
    monkeypatch.setattr(evaluate, "main", lambda argv: seen.append(argv) or 3)
    assert leave(capsys, "evaluate", "run", "--help")[0] == 3
    assert seen == [["run", "--help"]]


def test_errors_of_a_command_are_one_line(capsys, tmp_path):
    code, _, err = leave(capsys, "predict", str(tmp_path / "absent"), "clip.wav")
    assert code.startswith(f"error: {tmp_path}/absent: ") and "\n" not in code and not err


def test_backends_are_printed(capsys):
    code, out, _ = leave(capsys, "backends")
    assert code == 0 and out == f"{pruneattn.backends()}\n"


PROGRAM = """
import sys
from pruneattn.__main__ import main
try:
    main(sys.argv[1:])
finally:
    print("torch" in sys.modules)
"""


@pytest.mark.parametrize(
    ("word", "imported"),
    [
        ("--help", False),
        ("--version", False),
        ("evalute", False),
        pytest.param("backends", True, marks=pytest.mark.slow),
    ],
)
def test_torch_is_not_imported_before_the_command_is_known(word, imported):
    run = subprocess.run([sys.executable, "-c", PROGRAM, word], capture_output=True, text=True, timeout=120)
    assert run.stdout.splitlines()[-1] == str(imported)


def test_the_module_runs_as_a_program():
    run = subprocess.run([sys.executable, "-m", "pruneattn", "evalute"], capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr.startswith("error: unknown command 'evalute' (did you mean 'evaluate'?): choose one of train, ")


# Options


def declared_options(root):
    """For each option string that a file passes to ``add_argument``, the places: ``(file, line)``."""
    places = {}
    for path in sorted(root.rglob("*.py")):
        if path == GENERATED:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {
            target.id: node.value.value
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
                for value in node.args:
                    assert isinstance(value, (ast.Constant, ast.Name)), f"{path}:{value.lineno}: no literal name"
                    name = value.value if isinstance(value, ast.Constant) else names[value.id]
                    if name.startswith("-"):
                        places.setdefault(name, []).append((path.relative_to(root).as_posix(), node.lineno))
    return places


def test_each_option_is_declared_once():
    places = declared_options(PACKAGE)
    assert {file for name in ("--keep-rate", "--device", "--output") for file, _ in places[name]} == {"cli.py"}
    assert not {name: where for name, where in places.items() if len(where) > 1}


def test_a_second_declaration_is_found(tmp_path):
    (tmp_path / "a.py").write_text('NAME = "--rate"\n\ndef f(p):\n    p.add_argument(NAME, "-r")\n')
    (tmp_path / "b.py").write_text('def f(p):\n    p.add_argument("clip")\n    p.add_argument("--rate", type=int)\n')
    assert declared_options(tmp_path) == {"--rate": [("a.py", 4), ("b.py", 3)], "-r": [("a.py", 4)]}


@pytest.mark.parametrize(
    ("words", "keep_rate"),
    [
        ("run", None),
        ("run --keep-rate 0.7", 0.7),
        ("--keep-rate 0.7 run", 0.7),
        ("run --keep-rate=0.7", 0.7),
        ("run --keep-rate 0.9 0.7 0.5", [0.9, 0.7, 0.5]),
        ("--keep-rate 1 0.7 run --top-k 5", [1.0, 0.7]),
        ("--top-k 5 --keep-rate 0.9,0.7,0.5 run", (0.9, 0.7, 0.5)),
        ("--keep-rate 0.5 run --top-k 1", 0.5),
    ],
)
def test_a_keep_rate_is_one_number_or_one_for_each_block(words, keep_rate):
    parser = CommandParser()
    parser.add_argument("checkpoint")
    parser.add_argument("--top-k", type=int)
    add_keep_rate_option(parser)
    args = parser.parse_args(words.split())
    assert (args.checkpoint, args.keep_rate) == ("run", keep_rate)


@pytest.mark.parametrize("value", ["half", "0.9,", "0.9,x"])
def test_a_keep_rate_that_is_not_a_number_is_an_error(value, capsys):
    parser = CommandParser()
    add_keep_rate_option(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--keep-rate", value])
    assert f"argument --keep-rate: '{value}' is neither a number nor numbers joined" in capsys.readouterr().err


def test_keep_rates_are_a_sweep():
    parser = argparse.ArgumentParser()
    add_keep_rates_option(parser, (1.0, 0.5), per_block=True)
    assert parser.parse_args([]).keep_rates == (1.0, 0.5)
    assert parser.parse_args(["--keep-rates", "1", "0.9,0.7", "0.5"]).keep_rates == [1.0, (0.9, 0.7), 0.5]
    assert "(default: 1 0.5)" in parser.format_help()
    plain = argparse.ArgumentParser()
    add_keep_rates_option(plain, (1.0,))
    with pytest.raises(SystemExit):
        plain.parse_args(["--keep-rates", "0.9,0.7"])

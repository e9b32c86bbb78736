"""What the house promises of itself: imports have their requirements, commands in documents are accepted."""

import argparse
import ast
import re
import runpy
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

import backends

# Import -> distributions, where the names differ; of several, any one brings it.
DISTRIBUTIONS = {
    "PIL": ["pillow"],
    "pynvml": ["nvidia-ml-py"],
    "mlperf_loadgen": ["mlcommons-loadgen"],
    "onnxruntime": ["onnxruntime-gpu", "onnxruntime"],
    "tensorrt": ["tensorrt-cu13", "tensorrt"],
    "nvidia": ["nvidia-dali-cuda130", "nvidia-dali-cuda120"],
}
VENDORS = {"tensorrt", "torch_tensorrt", "nvidia"}  # need an NVIDIA GPU: in the files that install TensorRT
UNIMPORTED = {  # distribution -> what uses it
    "onnxscript": "torch.onnx.export",
    "pytest-xdist": "make test",
    "ruff": "make lint",
    "pyright": "make lint",
}


def read_text(path) -> str:
    return path.read_text(encoding="utf-8")


def requirements(name: str) -> set[str]:
    """The distributions that a requirements file names, also through `-r`."""
    found = set()
    for line in read_text(ROOT / name).splitlines():
        if other := re.match(r"-r (\S+)", line):
            found |= requirements(other[1])
        elif named := re.match(r"[A-Za-z][\w.-]*", line):
            found.add(re.sub(r"[-_.]+", "-", named[0]).lower())
    return found


def third_party() -> set[str]:
    """The top-level modules that any file of this repo imports anywhere and that are not its own."""
    own = {path.stem for path in [*ROOT.glob("*.py"), *(ROOT / "tests").glob("*.py")]} | {"utils"}
    names = set()
    for path in [*ROOT.glob("*.py"), *(ROOT / "utils").rglob("*.py"), *(ROOT / "tests").glob("*.py")]:
        for node in ast.walk(ast.parse(read_text(path))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add(str(node.module).partition(".")[0])
    return names - own - set(sys.stdlib_module_names)


@pytest.mark.parametrize("name", sorted(path.name for path in ROOT.glob("requirements*.txt")))
def test_every_import_is_named_in_the_requirements(name):
    named, vendors = requirements(name), "tensorrt" in name
    for module in third_party() - (set() if vendors else VENDORS):
        brings = DISTRIBUTIONS.get(module, [module.replace("_", "-").lower()])
        assert named & set(brings), f"{module} is imported, and {name} names none of {brings}"


def test_every_requirement_is_imported_or_used_by_a_command():
    brought = {name for module in third_party() for name in DISTRIBUTIONS.get(module, [module])}
    brought = {name.replace("_", "-").lower() for name in brought} | set(UNIMPORTED)
    assert requirements("requirements-tensorrt.txt") - brought == set()


def test_the_readme_is_short_enough_to_be_read():
    assert len(read_text(ROOT / "README.md").splitlines()) <= 170


@pytest.mark.parametrize("script", ["benchmark.py", "compare.py", "predict.py", "end_to_end.py"])
def test_help_comes_without_the_large_libraries(script):
    heavy = ["torch", "torchvision", "pandas", "matplotlib", "scipy", "onnx", "onnxruntime", "openvino"]
    code = f"""
import runpy, sys
sys.argv = [{script!r}, "--help"]
try:
    runpy.run_path({script!r}, run_name="__main__")
finally:
    print("loaded:", sorted(sys.modules.keys() & set({heavy})))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "usage:" in done.stdout and done.stdout.endswith("loaded: []\n"), done.stdout + done.stderr


# ---- commands in README.md and docs/


def commands() -> list[tuple[str, str]]:
    """(file, command) for every command in a code block or between backticks that starts with a program."""
    found = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = read_text(path)
        blocks = re.findall(r"^```(?:\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        lines = [line for block in blocks for line in block.splitlines()]
        lines += re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
        lines = [re.sub(r"\s#.*", "", line).strip() for line in lines]
        starts = r"(python3?|py|torchrun|pip|\.venv\S*python(\.exe)?) .|(\.\\)?make(\.bat)?( |$)"
        found += [(path.name, line) for line in dict.fromkeys(lines) if re.match(starts, line)]
    return found


def refused(script: str, arguments: list[str], monkeypatch, capsys) -> str:
    """What the script's own argument parser says against the arguments; nothing behind the parser runs."""
    accepted, parse, known = [], argparse.ArgumentParser.parse_args, argparse.ArgumentParser.parse_known_args

    def parse_and_stop(parser, *given):
        monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", known)  # which parse_args calls
        accepted.append(parse(parser, *given))
        raise SystemExit(0)

    def parse_known_and_stop(parser, *given):
        accepted.append(known(parser, *given))
        raise SystemExit(0)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_known_and_stop)
    monkeypatch.setitem(backends.SCRIPTS, "torchscript", "torchscript_inference")  # which the README adds
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    return "" if accepted else capsys.readouterr().err


def targets() -> set[str]:
    return set(re.findall(r"^(\w+):", read_text(ROOT / "Makefile"), re.MULTILINE))


@pytest.mark.parametrize("where, command", commands())
def test_every_command_in_the_documents_is_one_that_the_scripts_accept(where, command, monkeypatch, capsys):
    program, *words = shlex.split(command.replace("\\", "/"))
    if program.startswith(("make", "./make")):
        assert set(words) - {"QUICK=1"} <= targets(), f"{where}: {command}"
        return
    if words[0] == "-m" and "." in words[1]:  # a file of ours, run as a module
        words = [f"{words[1].replace('.', '/')}.py", *words[2:]]
    if "-m" in words and words[words.index("-m") + 1].startswith("utils."):  # one of our own files
        module = words.pop(words.index("-m") + 1)
        words[words.index("-m")] = f"{module.replace('.', '/')}.py"
    for flag in ("-r", "-m"):  # pip's files; modules, of which pytest's arguments are not ours
        if flag in words:
            named = words[words.index(flag) + 1]
            assert named in ("venv", "pytest", "pip") or (ROOT / named).is_file(), f"{where}: {command}"
            if named in ("venv", "pytest"):
                return
    script = next((word for word in words if word.endswith(".py")), None)
    if not script:
        assert program == "pip" or "pip" in words or words[:1] == ["-c"], f"{where}: {command}"
        return
    arguments = words[words.index(script) + 1 :]
    assert (ROOT / script).is_file(), f"{where}: {command}"
    if script == "install.py" and "argparse" not in read_text(ROOT / script):
        assert not arguments, f"{where}: {command}"  # and nothing is installed here
        return
    assert not refused(script, arguments, monkeypatch, capsys), f"{where}: {command}"


def test_there_are_commands_and_a_wrong_one_is_refused(monkeypatch, capsys):
    assert len(commands()) >= 10
    assert "--no-such-flag" in refused("compare.py", ["--no-such-flag"], monkeypatch, capsys)


# ---- Windows


def evaluated_at_import(tree: ast.AST) -> list[ast.AST]:
    """The nodes of a file outside of functions' bodies; decorators and defaults are among them."""
    found, waiting = [], [tree]
    while waiting:
        node = waiting.pop()
        found.append(node)
        body = node.body if isinstance(node, ast.FunctionDef) else []
        waiting += [child for child in ast.iter_child_nodes(node) if child not in body]
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "tests").glob("*.py")), ids=lambda path: path.name)
def test_windows_can_collect_every_test(path):
    lacks = {"SIGKILL", "SIGSTOP", "SIGCONT", "SIGHUP", "fork", "geteuid", "getuid", "mkfifo", "killpg"}
    names = (node for node in evaluated_at_import(ast.parse(read_text(path))))
    assert not [node.lineno for node in names if isinstance(node, ast.Attribute) and node.attr in lacks]

"""The house: import direction, light doors, what is shipped, pins that agree, documents."""

from __future__ import annotations

import ast
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from deploy import check_python
from tests.conftest import ROOT

MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
README = (ROOT / "README.md").read_text("utf-8")
LOCKS = {path.stem: path.read_text("utf-8") for path in (ROOT / "requirements").glob("*.lock")}
TRACKED = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).split()
SOURCES = [ROOT / name for name in TRACKED if name.endswith(".py")]


def test_imports_point_one_way() -> None:
    """The contracts stand in pyproject.toml, under [tool.importlinter]."""
    done = subprocess.run(
        [Path(sys.executable).parent / "lint-imports"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout


def test_the_import_rules_can_fail(tmp_path: Path) -> None:
    """A planted import in the wrong direction is found by the same rules."""
    for room in ("retrieval_contract", "towers", "export", "benchmarks", "deploy"):
        (tmp_path / room).mkdir()
        (tmp_path / room / "__init__.py").touch()
    (tmp_path / "retrieval_client").mkdir()
    (tmp_path / "retrieval_client" / "__init__.py").write_text("import towers\n")
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text("utf-8"))
    done = subprocess.run(
        [Path(sys.executable).parent / "lint-imports"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "retrieval_client -> towers" in done.stdout, done.stdout


def imports_of(path: Path) -> set[str]:
    """Top-level names that a file imports anywhere."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize(
    "path", sorted((ROOT / "model_repository").rglob("model.py")), ids=lambda p: p.parts[-3]
)
def test_python_models_import_the_contract_only_and_stay_short(path: Path) -> None:
    ours = {"retrieval_contract"}
    assert imports_of(path) - set(sys.stdlib_module_names) <= ours | {"numpy"}
    assert len(path.read_text("utf-8").splitlines()) < 60


def test_the_client_needs_no_torch() -> None:
    code = (
        "import sys, retrieval_client, retrieval_client.__main__; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_only_settings_reads_the_environment() -> None:
    readers = {
        path.relative_to(ROOT).as_posix()
        for path in SOURCES
        if "retrieval_client" in path.parts and re.search(r"os\.environ|getenv", path.read_text())
    }
    assert readers == {"clients/retrieval_client/settings.py"}


def test_the_wheel_holds_the_contract_and_the_client(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("make_retrieval-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    packages = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert packages == {"retrieval_contract", "retrieval_client"}
    assert {"retrieval_contract/py.typed", "retrieval_client/py.typed"} <= set(names)
    scripts = next(n for n in names if n.endswith("entry_points.txt"))
    assert b"retrieval = retrieval_client.__main__:main" in zipfile.ZipFile(wheel).read(scripts)


def test_files_keep_to_the_budget() -> None:
    long = {p.name: n for p in SOURCES if (n := len(p.read_text("utf-8").splitlines())) > 400}
    assert not long, long


def test_functions_keep_to_the_budget() -> None:
    long = {
        f"{path.name}, {node.name}": lines
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := (node.end_lineno or 0) - node.lineno + 1) > 50
    }
    assert not long, long


@pytest.mark.parametrize("name", sorted(LOCKS))
def test_locks_pin_everything_and_name_no_address(name: str) -> None:
    lines = [line for line in LOCKS[name].splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[\w.+]+", line) for line in lines), lines
    assert "://" not in LOCKS[name]


def pins(name: str) -> dict[str, str]:
    return dict(re.findall(r"^([A-Za-z0-9._-]+)==(\S+)$", LOCKS[name], re.MULTILINE))


def test_every_environment_has_the_same_versions() -> None:
    """Parity is proved in one environment and served from the other; only numpy must differ."""
    found: dict[str, set[str]] = {}
    for lock in LOCKS:
        for name, version in pins(lock).items():
            found.setdefault(name.lower(), set()).add(version)
    assert {name for name, versions in found.items() if len(versions) > 1} == {"numpy"}
    assert {"onnxruntime", "tokenizers", "pillow"} <= set(pins("server")) & set(pins("client"))
    assert pins("client")["numpy"] >= "2" > pins("server")["numpy"]


def test_installed_is_what_is_locked() -> None:
    from importlib.metadata import PackageNotFoundError, version

    wrong = {}
    for name, pin in pins("client").items():
        try:
            found = version(name).split("+")[0]
        except PackageNotFoundError:
            found = "nothing"
        if found != pin:
            wrong[name] = (pin, found)
    assert not wrong, f"run `make setup`: {wrong}"


# A letter in brackets, so that this file does not hold what it looks for.
FORBIDDEN = {
    "a path of one machine": r"/(home|root|Users)/",
    "an address of a package registry": r"https?://[^\s\"')]*(pypi|npmjs|deb\.debian)|"
    r"(index-url|find-links)[^a-z]+https?://",
    "a mark of unfinished work": r"\b(TOD[O]|FIXM[E]|XX[X])\b",
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_the_project_speaks_of_itself_alone(what: str) -> None:
    found = []
    for name in TRACKED:
        path = ROOT / name
        if path.suffix in {".png", ".jpg", ".safetensors", ".npy"} or not path.exists():
            continue
        for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
            if re.search(FORBIDDEN[what], line) or str(ROOT) in line:
                found.append(f"{name}:{number}: {line.strip()}")
    assert not found


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))


def test_the_readme_names_what_there_is() -> None:
    """Every `make target`, `python -m module` and `retrieval command` of the README exists."""
    from retrieval_client.__main__ import parser

    for target in re.findall(r"make ([a-z-]+)", README):
        assert target in make_targets(), target
    for module in re.findall(r"python -m ([a-z_.]+)", README):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
    for block in re.findall(r"```console\n(.*?)```", README, re.DOTALL):
        for line in block.splitlines():
            if line.startswith("$ retrieval "):
                parser().parse_args(shlex.split(line.removeprefix("$ retrieval "), comments=True))


def test_the_readme_names_the_pinned_image_and_its_two_commands_early() -> None:
    tag = re.search(r"^TRITON_TAG \?= (\S+)$", MAKEFILE, re.MULTILINE)
    assert tag
    assert tag[1] in README
    first_screen = "\n".join(README.splitlines()[:40])
    assert "make demo" in first_screen
    assert "make test" in first_screen


# ── the check before anything is installed ───────────────────────────────────────────────
def test_this_machine_passes_the_check() -> None:
    assert check_python.problems() == []


@pytest.mark.parametrize("version", [(3, 10), (3, 13)])
def test_an_unsuitable_python_is_told_so(version: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (*version, 0))
    (problem,) = check_python.problems()
    assert "expected 3.11 or 3.12 (NumPy 1.26, which Triton's Python stub needs" in problem
    assert f"got {version[0]}.{version[1]}" in problem
    assert "make demo PYTHON=python3.11" in problem


@pytest.mark.parametrize("found", ["glibc 2.35", "glibc 2.36", "glibc 2.100"])
def test_a_newer_c_library_is_good(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "confstr", lambda name: found)
    assert check_python.problems() == []


@pytest.mark.parametrize("found", ["glibc 2.31", "glibc 2.9", ""])
def test_an_older_c_library_is_told_so(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So is another: Alpine's has no such name."""
    monkeypatch.setattr(os, "confstr", lambda name: found)
    (problem,) = check_python.problems()
    assert "expected glibc 2.35 or newer, which Triton's wheel is built for" in problem
    assert f"got {found or 'another'};" in problem


def test_another_machine_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    (problem,) = check_python.problems()
    assert "expected Linux on x86-64" in problem
    assert "arm64" in problem


def test_what_a_slim_python_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Debian's packages are called, which carry the version."""
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    monkeypatch.setattr(check_python, "has_shared_python", lambda: False)
    venv, libpython = check_python.problems()
    assert venv.endswith(f"apt-get install python{version}-venv")
    assert libpython.endswith(f"apt-get install libpython{version}")


def test_the_check_runs_on_any_python_3() -> None:
    """Those of this machine, and by its grammar those before."""
    script = Path(check_python.__file__)
    ast.parse(script.read_text("utf-8"), feature_version=(3, 4))
    minors = {minor: shutil.which(f"python3.{minor}") for minor in range(5, 20)}
    for minor, python in minors.items():
        # A version manager's shim may stand for a Python that is not switched on.
        if python and subprocess.run([python, "-c", ""], capture_output=True).returncode == 0:
            done = subprocess.run([python, script], capture_output=True, text=True)
            assert "Traceback" not in done.stderr
            assert bool(done.stderr) == (done.returncode == 1)
            assert minor in (11, 12) or f"got 3.{minor};" in done.stderr


def test_a_run_says_what_it_left_out(
    pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine without anything, too."""
    from tests import conftest

    assert pytestconfig.pluginmanager.has_plugin(conftest.__file__)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(conftest, "REAL_CATALOG", ROOT / "nowhere")
    said = {what: (why, how) for what, why, how in conftest.left_out()}
    assert len(said) == 5 + bool(conftest.TWO_CORES.args[0])
    assert said["TensorRT plans and the `gpu` target"][0] == "no NVIDIA GPU here"
    assert said["container images: linted, not built"][0] == "no container engine here"
    assert all(how for _, how in said.values())

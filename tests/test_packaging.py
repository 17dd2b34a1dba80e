"""The package: one list of dependencies, every module in it, commands that exist, a citation that is README's."""

import subprocess
import sys
import tomllib

import pytest
from helpers import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]


def test_requirements_txt_is_the_one_list_of_dependencies():
    assert PROJECT["project"]["dynamic"] == ["dependencies"] and "dependencies" not in PROJECT["project"]
    assert SETUPTOOLS["dynamic"]["dependencies"] == {"file": ["requirements.txt"]}
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        assert line.startswith("#") or ">=" in line, line  # a lower bound each


def test_every_script_and_room_is_in_the_package():
    assert SETUPTOOLS["py-modules"] == sorted(path.stem for path in ROOT.glob("*.py"))
    folders = [name for name in ("hyma", "kernels") if (ROOT / name / "__init__.py").is_file()]
    assert SETUPTOOLS["packages"] == folders


def test_every_command_is_a_function():
    from hyma import commands

    for target in PROJECT["project"]["scripts"].values():
        module, _, function = target.partition(":")
        assert module == "hyma.commands" and callable(getattr(commands, function))


def test_nothing_needs_fcntl_to_be_imported(tmp_path):
    code = (
        "import sys; sys.modules['fcntl'] = None; import hyma.files, vlm; hyma.files.lock_folder(sys.argv[1]).close()"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_citation_is_that_of_the_readme():
    yaml = pytest.importorskip("yaml")
    paper = yaml.safe_load((ROOT / "CITATION.cff").read_text())["preferred-citation"]
    readme = (ROOT / "README.md").read_text()
    assert paper["title"] in readme and paper["url"] in readme
    for author in paper["authors"]:
        assert f"{author['family-names']}, {author['given-names']}" in readme

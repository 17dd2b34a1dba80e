"""Imports go one way: scripts -> hyma -> vlm, scripts and hyma -> kernels, and within hyma only down a list."""

import ast
import re
import subprocess
import sys

import pytest
from helpers import ROOT

# Within hyma a module imports only what stands after it.
HYMA = [
    "sharing",
    "commands",
    "folder_jobs",
    "fetching",
    "exporting",
    "adopting",
    "verifying",
    "row_order",
    "vector_files",
    "serving",
    "results_page",
    "searching",
    "search_index",
    "report",
    "answer",
    "figures",
    "plotting",
    "gallery",
    "records",
    "evaluation",
    "scoring",
    "selectors",
    "alignment",
    "gromov_wasserstein",
    "probes",
    "methods",
    "finishing",
    "tasks",
    "task_inputs",
    "prompts",
    "weights",
    "shortlist",
    "prediction",
    "adding",
    "hypernetworks",
    "projected_store",
    "refinement",
    "fitted_connectors",
    "unicon",
    "free_connectors",
    "training",
    "printed_ranking",
    "casting",
    "batches",
    "training_flags",
    "closed_form",
    "settled",
    "halving",
    "grid_state",
    "starting_run",
    "pairs",
    "runs",
    "ranking",
    "metrics",
    "standard_sets",
    "forecast",
    "embedding_work",
    "subset",
    "scan",
    "datasets",
    "table_folders",
    "corpus_files",
    "picture_folders",
    "braces",
    "tars",
    "arrow_tables",
    "columns",
    "tables",
    "decoding",
    "pass_shards",
    "annotations",
    "pictures",
    "packed",
    "inflating",
    "remote",
    "splits",
    "reuse",
    "sealing",
    "merging",
    "embeddings",
    "pair_names",
    "seeds",
    "distractors",
    "costs",
    "working_encoders",
    "machine",
    "signals",
    "brackets",
    "graphs",
    "ranks",
    "files",
    "before_main",
]
PACKAGES = ("hyma", "kernels", "benchmarks", "sample")  # the folders that hold our modules


def tracked_sources():
    """{path: text} of every Python file that git tracks, or, in a copy without git, of all in our folders; no tests."""
    command = ["git", "-C", str(ROOT), "ls-files", "*.py"]
    listing = subprocess.run(command, capture_output=True, text=True) if (ROOT / ".git").exists() else None
    if listing and listing.returncode == 0:
        paths = listing.stdout.splitlines()
    else:
        found = [*ROOT.glob("*.py")]
        for package in PACKAGES:
            found += (ROOT / package).rglob("*.py")
        paths = [str(path.relative_to(ROOT)) for path in found]
    paths = [path for path in sorted(paths) if not path.startswith("tests/") and (ROOT / path).is_file()]
    return {path: (ROOT / path).read_text() for path in paths}


def module_name(path):
    """hyma/runs.py is hyma.runs, kernels/__init__.py is kernels."""
    return path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def is_dynamic_import(node):
    """importlib.import_module("name") or __import__("name")."""
    if not isinstance(node, ast.Call) or not node.args or not isinstance(node.args[0], ast.Constant):
        return False
    return ast.unparse(node.func) in ("importlib.import_module", "__import__")


def imported_names(module, is_package, source):
    """Dotted names of all imports at any depth of a module, those inside functions too."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                package = parts[: len(parts) - node.level + is_package]
                base = ".".join([*package, *base.split(".")]).strip(".")
            names += [f"{base}.{alias.name}" for alias in node.names]
        elif is_dynamic_import(node):
            names.append(node.args[0].value)
    return names


def find_module(name, modules):
    """The module of ours that a dotted name is, or is a part of: vlm.BadInput is in vlm. None if it is nobody's."""
    name = {"build": "sample.build", "tenfold": "benchmarks.tenfold"}.get(name.split(".")[0], name)
    while name:
        if name in modules:
            return name
        name = name.rpartition(".")[0]
    return None


def complaint(importer, imported):
    """Why one of our modules may not import another, or None."""
    room, other_room = importer.split(".")[0], imported.split(".")[0]
    if (importer, imported.split(".")[:2]) == ("vlm", ["hyma", "sharing"]):
        return None  # within save_pretrained alone, and with a line for those who have no hyma/ beside vlm.py
    if room in ("kernels", "vlm"):
        return None if other_room == room else f"{importer} imports {imported}; {room} imports nothing of ours"
    if other_room in ("kernels", "vlm"):
        return None
    if room == "hyma":
        if other_room != "hyma":
            return f"{importer} imports the script {imported}"
        if "." not in importer or "." not in imported:
            return None  # the package itself, which holds nothing
        one, other = importer.split(".")[1], imported.split(".")[1]
        if one in HYMA and other in HYMA and HYMA.index(other) <= HYMA.index(one):
            return f"{importer} imports {imported}, which stands before it; an arrow goes down the list only"
        return None
    if other_room == "hyma" or (room == "benchmarks" and imported == "sample.build"):
        return None
    return f"{importer} imports {imported}; a script imports no other script, it runs it"


def complaints(sources):
    """All that is wrong with the imports of {path: source}."""
    modules = {module_name(path): path for path in sources}
    found = []
    for module, path in modules.items():
        room, _, name = module.partition(".")
        if "/" in path and room not in PACKAGES:
            found.append(f"{path}: give its folder a place in {__name__}.py")
        if room == "hyma" and name and name not in HYMA:
            found.append(f"{path}: give it a place in the list HYMA of {__name__}.py and in the design")
        for imported in imported_names(module, path.endswith("__init__.py"), sources[path]):
            target = find_module(imported, modules)
            if target and target != module and (problem := complaint(module, target)):
                found.append(problem)
    return found


def test_imports_go_one_way():
    sources = tracked_sources()
    assert {"vlm.py", "embed.py", "hyma/runs.py", "kernels/rank.py", "sample/build.py"} <= sources.keys()
    assert {"benchmarks/tenfold.py"} <= sources.keys()
    assert complaints(sources) == []


def test_the_readme_names_every_module_in_that_order():
    table = (ROOT / "README.md").read_text().partition("| `hyma/` |")[2].partition("\n\n")[0]
    named = re.findall(r"^\| `(\w+)\.py`", table, re.MULTILINE)
    assert named == [*HYMA, "__init__"]


MODULES = {
    "vlm.py": "",
    "embed.py": "",
    "train_hyma.py": "",
    "hyma/__init__.py": "",
    "hyma/files.py": "",
    "hyma/costs.py": "",
    "hyma/report.py": "",
    "kernels/__init__.py": "",
    "kernels/rank.py": "",
    "sample/build.py": "",
    "benchmarks/tenfold.py": "",
}


@pytest.mark.parametrize(
    "path, source, problem",
    [
        ("vlm.py", "from hyma.files import write_json", "vlm imports hyma.files; vlm imports nothing of ours"),
        ("vlm.py", "def load():\n    import kernels", "vlm imports kernels"),
        ("kernels/rank.py", "from vlm import BadInput", "kernels.rank imports vlm; kernels imports nothing of ours"),
        ("hyma/files.py", "import embed", "hyma.files imports the script embed"),
        ("hyma/files.py", "if True:\n    from sample.build import openclipart", "imports the script sample.build"),
        ("hyma/files.py", "from hyma import costs", "hyma.files imports hyma.costs, which stands before it"),
        ("hyma/files.py", "def late():\n    from . import costs", "hyma.files imports hyma.costs"),
        ("hyma/costs.py", "from .report import compose", "hyma.costs imports hyma.report"),
        ("embed.py", "from train_hyma import draw_pairs", "embed imports train_hyma; a script imports no other script"),
        ("embed.py", "import importlib\nimportlib.import_module('train_hyma')", "embed imports train_hyma"),
        ("sample/build.py", "import embed", "sample.build imports embed"),
        ("benchmarks/tenfold.py", "import evaluate, embed", "benchmarks.tenfold imports embed"),
        ("hyma/shapes.py", "", "hyma/shapes.py: give it a place"),
        ("tools/new.py", "", "tools/new.py: give its folder a place"),
    ],
)
def test_a_wrong_import_is_found(path, source, problem):
    assert complaints(MODULES) == []
    (found,) = complaints(MODULES | {path: source})
    assert problem in found


@pytest.mark.parametrize(
    "path, source",
    [
        ("embed.py", "import vlm, kernels\nfrom hyma import costs\nfrom hyma.files import write_json"),
        ("hyma/costs.py", "import vlm\nfrom hyma.files import write_json\nfrom kernels import true_rank"),
        ("hyma/report.py", "from hyma import costs, files\nfrom . import costs"),
        ("kernels/rank.py", "import torch\nfrom kernels import launch\nfrom . import launch"),
        ("benchmarks/tenfold.py", "import build\nimport vlm\nfrom hyma.files import run_script"),
        ("sample/build.py", "def prompts():\n    from hyma.files import write_json"),
    ],
)
def test_a_right_import_is_not_complained_about(path, source):
    assert complaints(MODULES | {path: source}) == []


# ------------------------------------------------------------------------------------------------- what is loaded

HEAVY = ("timm", "sentence_transformers", "transformers", "triton", "PIL", "scipy", "sklearn", "matplotlib", "pandas")


def loaded_by(module):
    """Which of the heavy packages, and of ours, an interpreter holds after importing the module alone."""
    code = f"import sys, {module}\nprint([name for name in {(*HEAVY, 'hyma', 'kernels')!r} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return ast.literal_eval(found.stdout)


def test_importing_vlm_is_as_light_as_importing_torch():
    found = loaded_by("vlm")
    assert found == loaded_by("torch")
    assert not {"timm", "sentence_transformers", "hyma", "kernels"} & set(found)

"""No Python file of this project calls what could run a stranger's data, or writes past the atomic writer.

The rules are about the syntax tree, so that a comment or a text that names a call is no fault. EXCEPTIONS names the
places that may do it, with the reason; one that is no longer needed fails the test too.
"""

import ast
import subprocess

import pytest
from helpers import ROOT

FOLDERS = ("hyma", "kernels", "benchmarks", "sample", "tests")  # beside the scripts

UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
UNSAFE_BUILTINS = {"eval", "exec", "__import__"}
UNSAFE_CALLS = {"os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "shutil.unpack_archive"}
UNSAFE_FLAGS = {"shell", "trust_remote_code", "allow_pickle"}
WRITERS = {"write_text", "write_bytes"}  # of a Path
SAVERS = {"torch.save", "numpy.save", "np.save", "np.savez"}

# {(file, function, what): why it may}
EXCEPTIONS = {
    ("tests/test_vlm.py", "", "import pickle"): "makes the payload of an attack",
    ("tests/test_standard_sets.py", "", "import pickle"): "makes CIFAR's files and the payload of an attack",
    ("tests/test_share.py", "router", "trust_remote_code=True"): "runs the module file that we have just written",
    ("hyma/sharing.py", "save_pair", "write_text"): "a new folder; README.md, written last, makes it whole",
    ("hyma/sharing.py", "write_router", "write_text"): "a new folder, as above",
    ("hyma/files.py", "atomic_file", "os.open to write"): "the atomic writer itself",
    ("hyma/files.py", "atomic_file", "open to write"): "the atomic writer itself",
    ("hyma/files.py", "lock_folder", "os.open to write"): "a lock, with O_NOFOLLOW; nothing is written into it",
    ("hyma/files.py", "lock_folder", "open to write"): "a lock, with O_NOFOLLOW; nothing is written into it",
    ("hyma/files.py", "save_tensors", "torch.save"): "into the atomic writer's file",
    ("hyma/ranks.py", "pack", "torch.save"): "into memory, to be sent",
    ("hyma/ranks.py", "join", "open to write"): "where the ranks print that print nothing",
    (
        "hyma/pass_shards.py",
        "append_lines",
        "open to write",
    ): "a journal grows line by line; a line that was cut is dropped",
    ("hyma/pass_shards.py", "append", "open to write"): "vectors are appended; one that was cut is dropped",
    ("hyma/pass_shards.py", "take", "open to write"): "a lock; nothing is written into it",
    ("hyma/sealing.py", "join_shards", "open to write"): "brought together among the shards, before it is saved whole",
}


# ---------------------------------------------------------------------------------------------------------- the rules


def is_product(path):
    """Whether users run this file: a script or a part of hyma/."""
    return "/" not in path or path.startswith("hyma/")


def keyword(call, name):
    """The source of a keyword argument, None where it is not given."""
    for argument in call.keywords:
        if argument.arg == name:
            return ast.unparse(argument.value)
    return None


def mode_of(call):
    """The mode of a call of open(path, mode); a mode that is no constant may be any."""
    given = call.args[1] if len(call.args) > 1 else next((k.value for k in call.keywords if k.arg == "mode"), None)
    if given is None:
        return "r"
    return given.value if isinstance(given, ast.Constant) else "w"


def unsafe_call(call, path):
    """What is forbidden of a call, or None."""
    name = ast.unparse(call.func)
    last = name.rpartition(".")[2]
    if name == "torch.load" and keyword(call, "weights_only") != "True":
        return "torch.load without weights_only=True"
    if name in UNSAFE_BUILTINS or name in UNSAFE_CALLS:
        return name
    if name == "np.load" and keyword(call, "allow_pickle") not in (None, "False"):
        return "np.load with allow_pickle"
    for flag in UNSAFE_FLAGS:
        if keyword(call, flag) not in (None, "False"):
            return f"{flag}={keyword(call, flag)}"
    if last == "extractall" or (last == "extract" and keyword(call, "path")):
        return f"{last} of an archive"
    return unsafe_write(call, name, last) if is_product(path) else None


def unsafe_write(call, name, last):
    """What is forbidden of a call that writes past hyma/files.py, or None."""
    if name == "open" and set(mode_of(call)) & set("wax+"):
        return "open to write"
    if name == "os.open" and set(ast.unparse(call).replace("|", " ").split()) & {
        "os.O_WRONLY",
        "os.O_RDWR",
        "os.O_CREAT",
    }:
        return "os.open to write"
    if last in WRITERS and name != last:  # hyma/files.py has a write_text of its own, which is atomic
        return last
    return name if name in SAVERS else None


def unsafe_import(node):
    """What is forbidden of an import, or None."""
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
    for name in names:
        if name.partition(".")[0] in UNSAFE_MODULES:
            return f"import {name}"
    return None


def find_unsafe(path, source):
    """[(file, function, what, line)] of all that is forbidden in a source; function: "" outside of all."""
    found = []

    def visit(node, function):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            function = node.name
        what = None
        if isinstance(node, ast.Call):
            what = unsafe_call(node, path)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            what = unsafe_import(node)
        if what:
            found.append((path, function, what, node.lineno))
        for child in ast.iter_child_nodes(node):
            visit(child, function)

    visit(ast.parse(source), "")
    return found


# ---------------------------------------------------------------------------------------------------------- the tests


def sources():
    """{path: text} of every Python file that git tracks, or, in a copy without git, of all in our folders."""
    if (ROOT / ".git").exists():
        listed = subprocess.run(
            ["git", "-C", str(ROOT), "ls-files", "*.py"], capture_output=True, text=True, check=True
        )
        paths = listed.stdout.splitlines()
    else:
        found = [*ROOT.glob("*.py")]
        for folder in FOLDERS:
            found += (ROOT / folder).rglob("*.py")
        paths = [str(path.relative_to(ROOT)) for path in found]
    return {path: (ROOT / path).read_text(encoding="utf-8") for path in sorted(paths) if (ROOT / path).is_file()}


def test_nothing_forbidden_is_called():
    found = [fault for path, text in sources().items() for fault in find_unsafe(path, text)]
    unknown = [f"{path}:{line}: {what}" for path, name, what, line in found if (path, name, what) not in EXCEPTIONS]
    assert not unknown, "\n".join(unknown)


def test_every_exception_is_still_needed():
    found = {fault[:3] for path, text in sources().items() for fault in find_unsafe(path, text)}
    assert not EXCEPTIONS.keys() - found


FORBIDDEN = {
    "torch.load(f)": "torch.load without weights_only=True",
    "torch.load(f, weights_only=False)": "torch.load without weights_only=True",
    "import pickle": "import pickle",
    "from pickle import loads": "import pickle",
    "def f():\n    import marshal": "import marshal",
    "import shelve as s": "import shelve",
    "eval(text)": "eval",
    "exec(text)": "exec",
    "subprocess.run(line, shell=True)": "shell=True",
    "model(name, trust_remote_code=True)": "trust_remote_code=True",
    "model(name, trust_remote_code=flag)": "trust_remote_code=flag",
    "np.load(f, allow_pickle=True)": "np.load with allow_pickle",
    "os.system(line)": "os.system",
    "yaml.load(text)": "yaml.load",
    "tarfile.open(f).extractall(folder)": "extractall of an archive",
    "zipfile.ZipFile(f).extractall()": "extractall of an archive",
    "archive.extract(member, path=folder)": "extract of an archive",
    "shutil.unpack_archive(f)": "shutil.unpack_archive",
    'open(path, "w")': "open to write",
    'open(path, mode="ab")': "open to write",
    "open(path, mode)": "open to write",
    "os.open(path, os.O_WRONLY | os.O_CREAT)": "os.open to write",
    "Path(path).write_text(text)": "write_text",
    "torch.save(value, path)": "torch.save",
}


@pytest.mark.parametrize("source", FORBIDDEN)
def test_the_checker_catches(source):
    assert [fault[2] for fault in find_unsafe("hyma/x.py", source)] == [FORBIDDEN[source]]


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(f, weights_only=True)",
        "model.eval()",
        "ast.literal_eval(text)",
        "re.compile(text)",
        "open(path)",
        'open(path, "rb")',
        "subprocess.run(words, shell=False)",
        "# eval(text)",
        "text = 'import pickle'",
    ],
)
def test_the_checker_lets_pass(source):
    assert find_unsafe("hyma/x.py", source) == []


def test_tests_and_benchmarks_may_write_files_of_their_own():
    assert find_unsafe("tests/x.py", 'open(path, "w")') == []
    assert find_unsafe("benchmarks/x.py", "path.write_text(text)") == []

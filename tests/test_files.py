"""hyma/files.py: atomic writes, locks, readers, and errors of one line."""

import os
import resource
import signal
import subprocess
import sys

import pytest
import torch
from helpers import ROOT

import vlm
from hyma.files import (
    atomic_file,
    lock_folder,
    make_folder,
    read_jsonl,
    run_script,
    save_tensors,
    sha256_file,
    write_csv,
    write_jsonl,
    write_text,
)
from hyma.machine import provenance
from hyma.signals import Signals
from vlm import BadInput


def test_atomic_file_keeps_the_old_one(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_file(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    write_text(path, "new")
    assert path.read_text() == "new" and path.stat().st_mode & 0o044


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_tensors({"step": 1}, path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # No file may grow beyond: a write fails as on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match="could not be written"):
            save_tensors({"step": 2, "weights": torch.randn(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert vlm.load_tensors(path) == {"step": 1} and list(tmp_path.iterdir()) == [path]


def test_lock_keeps_a_second_process_out(tmp_path):
    with lock_folder(tmp_path), pytest.raises(BadInput, match="another process"):
        lock_folder(tmp_path)
    lock_folder(tmp_path).close()


def test_rows_are_read_as_they_were_written(tmp_path):
    rows = [{"key": "a", "caption": 'naïve, "quoted"'}, {"key": "b", "caption": "second\nline"}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert read_jsonl(tmp_path / "rows.jsonl") == rows
    write_csv(tmp_path / "rows.csv", [{"pair": "a:t", "rank": 1}, {"pair": "b, c:t", "rank": 2}])
    assert (tmp_path / "rows.csv").read_text() == 'pair,rank\na:t,1\n"b, c:t",2\n'
    (tmp_path / "rows.jsonl").write_text('{"key": "a"}\n{"key":')
    with pytest.raises(BadInput, match="rows.jsonl: cannot be read as JSON lines"):
        read_jsonl(tmp_path / "rows.jsonl")


def bad_input():
    raise BadInput("--rows 0: must be positive")


def full_disk():
    raise OSError(28, "No space left on device", "runs/x/ledger.json")


def interrupted():
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "main, code, message",
    [
        (bad_input, 1, "embed.py: --rows 0: must be positive"),
        (full_disk, 1, "embed.py: runs/x/ledger.json: No space left on device"),
        (interrupted, 130, "embed.py: interrupted; run the same command again to resume"),
    ],
)
def test_an_error_that_the_user_can_mend_is_one_line(monkeypatch, capsys, main, code, message):
    monkeypatch.setattr(sys, "argv", ["/somewhere/embed.py"])
    with pytest.raises(SystemExit) as stop:
        run_script(main)
    if stop.value.code == 130:
        assert code == 130 and capsys.readouterr().err.strip() == message
    else:
        assert code == 1 and stop.value.code == message  # Python prints it and exits with status 1


def test_ctrl_c_is_not_lost_where_python_drops_exceptions():
    """In a __del__, as libraries have them: Python would print the KeyboardInterrupt and go on."""
    script = """
import signal, time
from hyma.files import run_script
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
class Dropped:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)
        time.sleep(0)
def main():
    Dropped()
    time.sleep(60)
run_script(main)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert done.returncode == 130 and done.stderr.strip() == "-c: interrupted; run the same command again to resume"


@pytest.mark.parametrize(
    "end, message",
    [
        ("run_script(int)\nsignal.raise_signal(signal.SIGINT)", "-c: interrupted"),
        ("run_script(fail)", "-c: interrupted; run the same command again to resume"),
    ],
    ids=["once it has ended", "while an error is said"],
)
def test_ctrl_c_at_the_end_of_a_script_shows_no_traceback(end, message):
    script = f"""
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
import hyma.before_main
from hyma.files import run_script
from vlm import BadInput
class Failure(BadInput):
    def __str__(self):
        signal.raise_signal(signal.SIGINT)
        return "an error"
def fail():
    raise Failure("an error")
{end}
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert done.returncode == 130 and done.stderr.strip() == message


def test_an_error_of_the_program_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_script(lambda: 1 / 0)


def test_provenance_names_versions_and_device():
    found = provenance("cpu")
    assert found["versions"]["torch"] == torch.__version__.split("+")[0]
    assert found["device"].startswith("cpu") and found.keys() >= {"commit", "started"}


# ------------------------------------------------------------------------------------------- links, pipes and signals


def test_nothing_is_written_through_a_link(tmp_path):
    """A lock that is a link would truncate what it points to; a folder that is one would put files elsewhere."""
    precious, folder = tmp_path / "precious", tmp_path / "folder"
    precious.write_text("kept")
    folder.mkdir()
    (folder / ".lock").symlink_to(precious)
    with pytest.raises(BadInput, match=".lock: is a link"):
        lock_folder(folder)
    (folder / ".x.json.1.tmp").symlink_to(precious)
    write_text(folder / "x.json", "new")
    (folder / "connectors").symlink_to(tmp_path)
    with pytest.raises(BadInput, match="connectors: is a link"):
        make_folder(folder / "connectors")
    assert precious.read_text() == "kept" and not (folder / "x.json").is_symlink()


@pytest.mark.parametrize("read", [vlm.read_json, vlm.load_tensors, read_jsonl, sha256_file])
def test_a_pipe_is_refused_and_not_waited_for(tmp_path, read):
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(BadInput, match="pipe.pt: is no regular file"):
        read(tmp_path / "pipe.pt")


@pytest.mark.parametrize(
    "text, read, message",
    [
        ("[1, 2]", vlm.read_json, "expected a JSON object, found list"),
        ("[" * 100_000, vlm.read_json, "cannot be read as JSON"),
        ('{"a": 1}\n[2]\n', read_jsonl, "line 2: expected a JSON object, found list"),
        ("[" * 100_000, read_jsonl, "cannot be read as JSON lines"),
    ],
)
def test_json_of_another_shape_is_one_line(tmp_path, text, read, message):
    (tmp_path / "x").write_text(text)
    with pytest.raises(BadInput, match=message) as error:
        read(tmp_path / "x")
    assert "\n" not in str(error.value)


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    (tmp_path / ".checkpoint.pt.123.tmp").write_text("half")
    lock_folder(tmp_path).close()
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_signals_are_noticed_between_steps(capsys):
    before = signal.getsignal(signal.SIGTERM)
    with Signals() as signals:
        assert not signals.arrived()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.arrived() and not signals.arrived()  # saved once, and the work continues
        signals.leave_if_asked()
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.arrived()
        with pytest.raises(SystemExit) as stop:
            signals.leave_if_asked()
    assert stop.value.code == 143 and "run the same command again to resume" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_second_signal_is_obeyed_at_once():
    script = "import os, signal; from hyma.signals import Signals\nwith Signals():\n"
    script += "    for _ in range(2): os.kill(os.getpid(), signal.SIGTERM)\n    print('still here')"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGTERM and not done.stdout


SCRIPTS = [[f"{name}.py"] for name in ("embed", "train_hyma", "train_grid", "evaluate", "search")]
SCRIPTS += [["-m", "hyma.report"]]


def start_importing(folder, script):
    """Starts a script that stays at `import torch` until its stdin is closed, and then ends with status 7."""
    (folder / "torch.py").write_text("import os, sys; print('importing', flush=True); sys.stdin.read(); os._exit(7)\n")
    # PYTHONSAFEPATH: the project's folder would be in front of this torch
    environment = os.environ | {"PYTHONPATH": f"{folder}:{ROOT}", "PYTHONSAFEPATH": "1"}
    process = subprocess.Popen(
        [sys.executable, *script],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    assert process.stdout.readline() == "importing\n"
    return process


@pytest.mark.parametrize("script", SCRIPTS, ids=" ".join)
def test_signals_while_torch_is_imported_show_no_traceback(tmp_path, script):
    process = start_importing(tmp_path, script)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.strip().endswith("py: interrupted")
    assert len(err.strip().splitlines()) == 1

    process = start_importing(tmp_path, script)
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 7 and not err  # it goes on

    process = start_importing(tmp_path, script)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM and not err  # 143 in a shell


def test_running_out_of_memory_names_the_flags(monkeypatch, capsys):
    def main():
        torch.empty(2**62, dtype=torch.uint8)

    monkeypatch.setattr(sys, "argv", ["train_hyma.py"])
    with pytest.raises(SystemExit) as stop:
        run_script(main)
    assert "out of memory" in str(stop.value.code) and "--batch-size" in str(stop.value.code)

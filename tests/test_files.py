"""hyma/files.py: atomic writes, locks, readers, and errors of one line."""

import resource
import sys

import pytest
import torch

import vlm
from hyma.files import (
    atomic_file,
    lock_folder,
    provenance,
    read_jsonl,
    run_script,
    save_tensors,
    write_csv,
    write_jsonl,
    write_text,
)
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
        (interrupted, 130, "embed.py: interrupted; run the same command again to go on"),
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


def test_an_error_of_the_program_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_script(lambda: 1 / 0)


def test_provenance_names_versions_and_device():
    found = provenance("cpu")
    assert found["versions"]["torch"] == torch.__version__.split("+")[0]
    assert found["device"].startswith("cpu") and found.keys() >= {"commit", "started"}

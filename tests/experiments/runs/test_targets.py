"""Where results go: what is in the way is named before anything is computed, and two runs never share a folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from osculate.errors import ArgumentError
from osculate.experiments.runs.records import RunFolder
from osculate.experiments.runs.targets import OutputError, exclusive, require_file, require_folder, writing


def test_a_file_in_the_way_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ArgumentError, match=r"'.*file' is a file; name another folder with --out"):
            require_folder(path)
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(ArgumentError, match="a link to nowhere"):
        require_folder(tmp_path / "link")


def test_checking_writes_nothing(tmp_path: Path) -> None:
    require_folder(tmp_path / "a" / "b", "result.json")
    require_file(tmp_path / "c" / "result.json")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_the_way_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "result.json").mkdir()
    with pytest.raises(ArgumentError, match="a folder is there"):
        require_folder(tmp_path, "result.json")
    with pytest.raises(ArgumentError, match="is a folder; name a file in it"):
        require_file(tmp_path / "result.json")


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # root may write anywhere
    with pytest.raises(ArgumentError, match="is not writable"):
        require_folder(tmp_path / "new")


def test_a_refusal_of_the_system_names_the_place(tmp_path: Path) -> None:
    message = r"'results' cannot be written \(No space left on device\)"
    with pytest.raises(OutputError, match=message), writing(Path("results")):
        raise OSError(28, "No space left on device")


def test_an_error_that_is_no_refusal_passes() -> None:
    with pytest.raises(RuntimeError, match="shapes differ"), writing(Path("results")):
        raise RuntimeError("shapes differ")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the device that is always full")
def test_torch_does_not_hide_a_full_disk() -> None:
    with (
        pytest.raises(OutputError, match="No space left on device"),
        writing(Path("results")),
        Path("/dev/full").open("wb", buffering=0) as file,
    ):
        torch.save({"state": torch.zeros(100_000)}, file)


def test_a_failed_checkpoint_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    folder = RunFolder(tmp_path)
    folder.save_checkpoint({"iterations": 1})
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"checkpoint\.pt' cannot be written \(No space left on device\)"):
        folder.save_checkpoint({"iterations": 2})
    assert folder.load_checkpoint(torch.device("cpu")) == {"iterations": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


@pytest.mark.skipif(os.name != "posix", reason="holds of POSIX")
class TestExclusive:
    HOLD = """
import sys
from pathlib import Path
from osculate.experiments.runs.targets import exclusive
with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""

    def test_one_process_at_a_time(self, tmp_path: Path) -> None:
        folder = tmp_path / "run"
        words = [sys.executable, "-c", self.HOLD, str(folder)]
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == "held\n"
            with pytest.raises(ArgumentError, match="another process is writing to folder"), exclusive(folder):
                pass
            other.kill()  # a process that dies lets go
            other.wait()
        with exclusive(folder):
            assert list(folder.iterdir()) == []
        with exclusive(folder):
            pass

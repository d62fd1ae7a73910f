"""Files are replaced whole or not at all, several of them together, and only marked leftovers are ever removed."""

import os
import stat
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from killing import killed
from vitrim import output
from vitrim.errors import OutputError
from vitrim.output import is_leftover, recover, remove_leftovers, replacing, replacing_files


def write_pair(folder: Path, text: str) -> None:
    with replacing_files(folder) as staged:
        (staged / "a").write_text(text)
        (staged / "b").write_text(text)
        (staged / "c").touch()


def test_several_files_are_replaced_all_or_none_however_the_process_dies(tmp_path, monkeypatch):
    found = []
    for at in range(20):
        folder = tmp_path / str(at)
        folder.mkdir()
        for name in ("a", "b", "c", "mine"):
            (folder / name).write_text("old")
        died = killed(lambda folder=folder: write_pair(folder, "new"), at, monkeypatch)
        recover(folder)
        content = {path.name: path.read_text() for path in folder.iterdir() if not is_leftover(path)}
        new = {"a": "new", "b": "new", "mine": "old"}
        assert content in (new, dict.fromkeys(("a", "b", "c", "mine"), "old"))
        found.append(content == new)
        write_pair(folder, "newer")
        assert sorted(path.name for path in folder.iterdir()) == ["a", "b", "mine"]
        if not died:
            break
    assert found[0] is False
    assert found[-1] is True
    assert found.count(True) > 2


def test_what_a_killed_write_leaves_goes_with_the_next_one(tmp_path, monkeypatch):
    (tmp_path / "inner").mkdir()
    target = tmp_path / "inner" / "w.safetensors"

    def write() -> None:
        with replacing(target) as part:
            save_file({"a": torch.ones(3)}, part)

    assert killed(write, 0, monkeypatch)
    assert [is_leftover(path) for path in target.parent.iterdir()] == [True]
    remove_leftovers(tmp_path)
    assert not list(target.parent.iterdir())
    assert killed(write, 0, monkeypatch)
    write()
    assert [path.name for path in target.parent.iterdir()] == ["w.safetensors"]


def test_files_of_users_are_never_removed(tmp_path):
    names = ["movie.mkv.part", "x.lock", ".tmpabc", ".vitrim-part-file", "y.part/inside", ".a.1.part"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    remove_leftovers(tmp_path)
    with replacing(tmp_path / "new") as part:
        part.write_text("x")
    write_pair(tmp_path, "x")
    assert all((tmp_path / name).read_text() == "mine" for name in names)


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_permissions_follow_the_umask_or_the_file_before(tmp_path, mask):
    path, before = tmp_path / "w.safetensors", os.umask(mask)
    try:
        with replacing(path) as part:
            save_file({"a": torch.ones(3)}, part)  # Writes 0600 by itself.
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask
        path.chmod(0o640)
        with replacing(path) as part:
            save_file({"a": torch.ones(3)}, part)
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
    finally:
        os.umask(before)


def test_of_many_writers_of_a_new_file_one_succeeds(tmp_path):
    path, ready, outcomes = tmp_path / "t.md", threading.Barrier(6), []
    refusals: list[str] = []

    def write(number: int) -> None:
        ready.wait()
        try:
            with replacing(path, overwrite=False) as part:
                part.write_text(str(number))
            outcomes.append(number)
        except OutputError as error:
            refusals.append(str(error))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 1
    assert refusals == [f"{path} exists; choose another name or remove it"] * 5
    assert path.read_text() == str(outcomes[0])


def test_a_failed_write_of_several_files_changes_none(tmp_path):
    write_pair(tmp_path, "old")

    def fail() -> None:
        with replacing_files(tmp_path) as staged:
            (staged / "a").write_text("new")
            raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match=r"No space left on device\); free some"):
        fail()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "old", "b": "old"}


def test_file_systems_without_locks_are_written_to_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(output, "fcntl", None)
    write_pair(tmp_path, "one")
    write_pair(tmp_path, "two")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "two", "b": "two"}


def test_errors_without_a_number_are_reported_in_words(tmp_path):
    for error in (OSError("no such thing"), OSError()):
        with pytest.raises(OutputError, match=r"cannot write .*\((no such thing|OSError)\)"), replacing(tmp_path / "x"):
            raise error

"""Paths are checked at the edge, files are read with care, and written whole or not at all."""

import os
import stat
import threading
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from bilens._core.files import (
    destination,
    destination_folder,
    open_tensors,
    read_json,
    regular_file,
    to_path,
    write_atomically,
    write_files,
)
from bilens.errors import ArgumentError, CheckpointError, ModelNotFoundError, OverwriteError, WriteError


def write(text):
    return lambda beside: beside.write_text(text)


def test_folders_are_made(tmp_path):
    path = tmp_path / "figures" / "new" / "page.html"
    write_atomically(path, lambda beside: beside.write_text("text"))
    assert path.read_text() == "text"
    assert os.listdir(path.parent) == ["page.html"]


def test_what_fails_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "page.html"
    path.write_text("before")

    def fail(beside):
        beside.write_text("half")
        raise OSError("no space left on device")

    with pytest.raises(WriteError, match=r"page.html could not be written: no space.*as it was"):
        write_atomically(path, fail)
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["page.html"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        SafetensorError("Error: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_one_line(tmp_path, error):
    """Whoever was writing: the file system, safetensors, or tokenizers, which raises a bare Exception."""

    def fail(beside):
        raise error

    with pytest.raises(WriteError, match=r"model could not be written: .*No space left on device") as caught:
        write_atomically(tmp_path / "model", fail)
    assert "\n" not in str(caught.value)

    def half(folder):
        with open(f"{folder}/tokenizer.json", "w") as file:
            file.write("{")
        raise Exception("No space left on device (os error 28)")

    with pytest.raises(WriteError, match=r"could not be written: No space left"):
        write_files(tmp_path, half)
    assert os.listdir(tmp_path) == []


def test_places_that_are_none(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(ArgumentError, match=r"is a folder"):
        destination(tmp_path)
    with pytest.raises(ArgumentError, match=r"its folder cannot be made"):
        destination(tmp_path / "file" / "page.html")
    with pytest.raises(ArgumentError, match=r"cannot be a folder to write into: .*file is a file"):
        destination_folder(tmp_path / "file")

    # root may write anywhere, so permissions alone would not show it
    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    for ask in (destination, destination_folder):
        with pytest.raises(ArgumentError, match=r"cannot be written: Permission denied"):
            ask(tmp_path / "page.html")


def test_what_is_no_regular_file_stays(tmp_path):
    """A pipe and a device are refused, and are what they were."""
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", "/dev/null"):
        before = os.stat(place).st_mode
        for ask in (destination, lambda path: write_atomically(path, write("text"))):
            with pytest.raises(ArgumentError, match=r"is a device or a pipe"):
                ask(place)
        assert os.stat(place).st_mode == before
    assert stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)


def test_links_lead_to_what_is_written(tmp_path):
    """A link stays one, also where what it points to is yet to be made; the file beside is made in that folder."""
    (tmp_path / "there").mkdir()
    real, link = tmp_path / "there" / "page.html", tmp_path / "link.html"
    link.symlink_to(real)
    for text in ("new", "newer"):
        write_atomically(link, write(text))
        assert link.is_symlink()
        assert real.read_text() == text
    assert sorted(os.listdir(tmp_path)) == ["link.html", "there"]
    assert os.listdir(tmp_path / "there") == ["page.html"]


def test_nobody_foresees_the_file_beside(tmp_path, monkeypatch):
    """Its name is drawn, and it is made anew: a link planted under that very name is not followed."""
    victim, names = tmp_path / "victim", ["planted", "free"]
    victim.write_text("precious")
    monkeypatch.setattr("bilens._core.files.secrets.token_hex", lambda n: names.pop(0))
    (tmp_path / ".page.html.planted.part").symlink_to(victim)
    with pytest.raises(WriteError, match=r"File exists"):
        write_atomically(tmp_path / "page.html", write("text"))
    assert victim.read_text() == "precious"
    write_atomically(tmp_path / "page.html", write("text"))
    assert (tmp_path / "page.html").read_text() == "text"


def test_a_file_of_another_kind_is_not_replaced(tmp_path):
    """A page goes over a page or an empty file, never over somebody's data."""
    path = tmp_path / "out"
    for before in (b"", b"<!DOCTYPE html><p>", b"<!doctype HTML>"):
        path.write_bytes(before)
        destination(path, replaces=b"<!DOCTYPE html>")
    path.write_bytes(b"{}")
    with pytest.raises(OverwriteError, match=r"of another kind.*Give another name"):
        destination(path, replaces=b"<!DOCTYPE html>")


def test_permissions_and_long_names(tmp_path):
    """As any other new file, also where the name leaves no room for a longer one."""
    (tmp_path / "other").touch()
    path = tmp_path / ("n" * 250)
    write_atomically(path, lambda beside: beside.chmod(0o600))
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_threads_write_the_same_file(tmp_path):
    """Each writes a file of its own; the last one renamed stays, whole."""
    texts = [str(i) * 100_000 for i in range(8)]
    threads = [threading.Thread(target=write_atomically, args=(tmp_path / "file", write(text))) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "file").read_text() in texts
    assert os.listdir(tmp_path) == ["file"]


NO_PATHS = [None, 5, True, b"bytes", ["a"], {"a": 1}, "", "a\0b", "x" * 300, "~nobody-of-that-name/x", "\ud800"]


@pytest.mark.parametrize("path", NO_PATHS, ids=repr)
def test_what_is_no_path_is_refused_by_name(path):
    with pytest.raises(ArgumentError, match=r"^source (is|')"):
        to_path(path, "source")


def test_homes_are_expanded_and_what_is_not_there_is_left_to_the_caller(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert to_path("~/x") == tmp_path / "x"
    (tmp_path / "file").touch()
    assert to_path(tmp_path / "file" / "under") == tmp_path / "file" / "under"


def test_only_regular_files_of_a_sensible_size_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b"12345")
    for path, reason in {
        tmp_path / "pipe": "a pipe, a socket or a device",
        Path("/dev/zero"): "a pipe, a socket or a device",
        tmp_path: "a folder",
        tmp_path / "large" / "under": "Not a directory",
    }.items():
        for read in (regular_file, read_json, lambda path: open_tensors(path).__enter__()):
            with pytest.raises(CheckpointError, match=reason):
                read(path)
    with pytest.raises(ModelNotFoundError, match=r"no file .*none"):
        read_json(tmp_path / "none")
    assert regular_file(tmp_path / "large", 5) == tmp_path / "large"
    with pytest.raises(CheckpointError, match="has 5 bytes, expected at most 4"):
        regular_file(tmp_path / "large", 4)


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"\xff\xfe", b"nonsense", b"[" * 100_000, b'{"a": ' + b"9" * 6000 + b"}", b"[1, 2]", b"5", b"null"],
    ids=lambda text: repr(text[:10]),
)
def test_damaged_json_names_the_file_and_what_to_do(tmp_path, text):
    path = tmp_path / "plan.json"
    path.write_bytes(text)
    with pytest.raises(CheckpointError, match=r"plan\.json (is not JSON|holds a).*Start again\.$"):
        read_json(path, remedy="Start again.")


def test_an_error_within_an_open_file_stays_what_it_is(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.raises(KeyError), open_tensors(tmp_path / "a.safetensors"):
        raise KeyError("mine")
    with pytest.raises(ModelNotFoundError), open_tensors(tmp_path / "a.safetensors"):
        raise ModelNotFoundError("mine")

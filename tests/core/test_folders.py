"""A folder holds one run's work: returned when it is finished, gone on with when it is not, never replaced unasked."""

import json
import os

import pytest

from bilens._core.folders import alone_in, claim, differences, digest_of, finish
from bilens.errors import ArgumentError, CheckpointError, OverwriteError, WriteError

IDENTITY = {"config": {"lr": 1.0, "betas": (0.9, 0.95)}, "texts": "abc"}


@pytest.fixture
def record(tmp_path):
    return tmp_path / "training.json"


def ask(record, identity=IDENTITY, **options):
    options.setdefault("overwrite", False)
    return claim(record, identity, ["checkpoint", "model"], others=["tokenizer"], **options)


def fill(record, *names):
    for name in names:
        (record.parent / name).write_text(name)


def run(record, identity=IDENTITY):
    assert ask(record, identity) is None
    fill(record, "tokenizer", "model")
    finish(record, identity, ["model"], {"loss": 1.5})


def test_the_same_run_again(record):
    """Before it is finished it goes on with what is there; afterwards it is its record."""
    for _ in range(2):
        assert ask(record) is None
        fill(record, "tokenizer", "checkpoint")
    (record.parent / "checkpoint").unlink()
    run(record)
    assert ask(record)["loss"] == 1.5
    assert ask(record, overwrite=True)["loss"] == 1.5  # of its own nothing is removed
    (record.parent / "model").unlink()
    assert ask(record) is None  # nothing is left to lose, and it is made again


OTHER = {"config": {"lr": 2.0, "betas": (0.9, 0.95)}, "texts": "abc"}


@pytest.mark.parametrize("finished", [True, False])
def test_another_run_is_refused_with_what_differs(record, finished):
    """Finished, or interrupted with a checkpoint; overwriting removes it all."""
    if finished:
        run(record)
    else:
        ask(record)
        fill(record, "tokenizer", "checkpoint")
    before = {name: (record.parent / name).read_bytes() for name in os.listdir(record.parent)}
    with pytest.raises(OverwriteError, match=r"holds other work: lr \(1.0 there, 2.0 here\).*overwrite=True"):
        ask(record, OTHER)
    assert {name: (record.parent / name).read_bytes() for name in os.listdir(record.parent)} == before
    assert ask(record, OTHER, overwrite=True) is None
    assert os.listdir(record.parent) == ["training.json"]
    assert ask(record, OTHER) is None  # a run that was begun so goes on without the word


def test_what_came_to_nothing_is_in_nobodys_way(record):
    """A run that was stopped before its first checkpoint."""
    ask(record)
    fill(record, "tokenizer")
    assert ask(record, OTHER) is None
    assert os.listdir(record.parent) == ["training.json"]


def test_work_that_was_changed_since(record):
    """The weights were fine-tuned, say."""
    run(record)
    fill(record, "model", "tokenizer")
    (record.parent / "model").write_text("tuned")
    with pytest.raises(OverwriteError, match=r"model changed since"):
        ask(record)
    assert (record.parent / "model").read_text() == "tuned"
    assert ask(record, overwrite=True) is None


def test_work_of_somebody_else(record):
    """Files without a record, with the record of something else, or with a damaged one."""
    fill(record, "tokenizer")
    with pytest.raises(OverwriteError, match=r"it has tokenizer, which training.json says nothing of"):
        ask(record)
    record.write_text(json.dumps({"config": {}, "epochs": []}))
    with pytest.raises(OverwriteError, match=r"says nothing of"):
        ask(record)
    record.write_text("{")
    with pytest.raises(CheckpointError, match=r"training.json.*JSON"):
        ask(record)
    assert ask(record, overwrite=True) is None


def test_differences():
    assert differences(json.loads(json.dumps(IDENTITY)) | {"step": 3}, IDENTITY) == {}
    assert differences({"config": {"a": 1, "b": 2}}, {"config": {"a": 1, "c": 3}, "d": 4}) == {
        "c": (None, 3),
        "b": (2, None),
        "d": (None, 4),
    }


def test_digest_of_texts():
    """Order and borders count."""
    assert digest_of(["ab", "c"]) == digest_of(["ab", "c"])
    assert len({digest_of(texts) for texts in (["ab", "c"], ["a", "bc"], ["c", "ab"], ["abc"], [])}) == 5


def test_one_at_a_time(tmp_path):
    """A second run is refused while the first is at work, and leaves nothing behind; a killed one blocks nobody."""
    folder = tmp_path / "new" / "folder"
    with alone_in(folder), pytest.raises(WriteError, match=r"another process is writing to"), alone_in(folder):
        pass
    with pytest.raises(ZeroDivisionError), alone_in(folder):
        _ = 1 / 0
    child = os.fork()
    if child == 0:
        with alone_in(folder):
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    with alone_in(folder):
        assert os.listdir(folder) == []
    (tmp_path / "file").touch()
    with pytest.raises(ArgumentError, match=r"cannot be a folder"), alone_in(tmp_path / "file"):
        pass

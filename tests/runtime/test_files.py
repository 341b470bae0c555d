"""Small files: whole or not at all, read within limits, removed only when they are ours."""

import errno
import os
import threading
from pathlib import Path

import pytest

from hybridtrain import report
from hybridtrain.data.prepare import folder
from hybridtrain.errors import UserError
from hybridtrain.export import destination
from hybridtrain.runtime import files
from tests.runs import immutable


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "summary.json"
    files.write_atomically(file, "old")

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write_atomically(file, "new")
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_two_writers_do_not_disturb_each_other(tmp_path: Path) -> None:
    file, errors = tmp_path / "summary.json", []

    def write(text: str) -> None:
        try:
            for _ in range(50):
                files.write_atomically(file, text * 1000)
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert file.read_text() in [letter * 1000 for letter in "abcd"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff\xfe{}", "not UTF-8"),
        (b"{", "not JSON"),
        (b"[" * 200_000, "nested too deeply"),
        (b"[1]", "no object but list"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "git lfs pull"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        files.read_object(file, field="model.from_pretrained")
    assert str(caught.value).startswith(f"model.from_pretrained={file}: ")


def test_a_folder_or_nothing_in_the_place_of_a_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.json"):
        with pytest.raises(UserError, match="cannot be read"):
            files.read_json(path, field="data.path")


def test_json_has_no_word_for_infinity(tmp_path: Path) -> None:
    files.write_json(
        tmp_path / "a.json", {"a": float("inf"), "b": [float("nan"), 1.5], "c": (1, {"d": float("-inf")})}
    )
    assert files.read_object(tmp_path / "a.json", field="x") == {
        "a": None,
        "b": [None, 1.5],
        "c": [1, {"d": None}],
    }


def test_discarding_removes_links_not_what_they_point_to(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    assert files.discard(tmp_path / "link")
    assert files.discard(tmp_path / "link")  # it is gone: nothing to do
    assert not (tmp_path / "link").is_symlink()
    assert (tmp_path / "elsewhere" / "file").read_text() == "kept"


def test_what_cannot_be_removed_is_warned_of_and_left_and_the_rest_goes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = tmp_path / "old"
    old.mkdir()
    for name in "abc":
        (old / name).write_text("")
    with immutable(old / "b"):
        assert not files.discard(old)
        assert "old cannot be removed and stays (Operation not permitted)" in caplog.text
        assert [path.name for path in old.iterdir()] == ["b"]
    assert files.discard(old)


def test_a_folder_with_files_of_others_is_refused_until_they_are_ours(tmp_path: Path) -> None:
    names, claim = ["index.html", "loss.png"], {"record": ".hybridtrain.json", "field": "report.out"}
    files.check_replaceable(tmp_path, names, **claim)  # empty: nothing to lose
    files.write_record(tmp_path, names, record=".hybridtrain.json")
    (tmp_path / "loss.png").write_text("ours")
    files.check_replaceable(tmp_path, names, **claim)
    (tmp_path / "mine.png").write_text("the user's")
    with pytest.raises(UserError, match=r"report.out=.*it has mine.png, which this command did not write"):
        files.check_replaceable(tmp_path, [*names, "mine.png"], **claim)


@pytest.mark.parametrize("place", ["checkpoints", "checkpoints/step-00000004/mine"])
@pytest.mark.parametrize("field", ["data.path", "export.out", "report.out"])
def test_nothing_is_written_among_checkpoints_that_will_be_removed(
    tmp_path: Path, field: str, place: str
) -> None:
    (tmp_path / "config.yaml").write_text("")
    out = tmp_path / place
    (tmp_path / "checkpoints" / "step-00000004").mkdir(parents=True)
    write = {
        "data.path": lambda: folder.check_free(out, read=[]),
        "export.out": lambda: destination.check(out, field="export.out"),
        "report.out": lambda: report.write([], "", name="", out=out),
    }[field]
    with pytest.raises(
        UserError, match=f"{field}=.*it lies among the checkpoints of .*, which that run removes"
    ):
        write()
    assert sorted(os.listdir(tmp_path / "checkpoints" / "step-00000004")) == []


def test_a_record_that_names_what_lies_outside_is_not_believed(tmp_path: Path) -> None:
    names = ["a.png", "../b.png", "/etc/passwd", "sub/../../c.png", "", ".", "..", "sub/d.png", 3, "e\0.png"]
    files.write_json(tmp_path / ".hybridtrain.json", {"files": names})
    assert files.read_record(tmp_path, record=".hybridtrain.json") == {"a.png", "sub/d.png"}


def test_an_error_of_the_disk_is_told_in_words_that_fit(tmp_path: Path) -> None:
    for code, words in (
        (errno.ENOSPC, "the disk is full"),
        (errno.EROFS, "read-only"),
        (errno.ENOENT, "moved or removed"),
        (errno.EIO, "Input/output"),
    ):
        assert words in str(files.unwritable("run.dir", tmp_path, OSError(code, os.strerror(code))))


def test_what_a_killed_writer_left_is_removed_when_it_is_old(tmp_path: Path) -> None:
    old, new, theirs = (
        tmp_path / ".summary.json.71-140.partial",
        tmp_path / ".index.html.72-140.partial",
        tmp_path / ".notes.partial",
    )
    for file in (old, new, theirs):
        file.write_text("half")
    os.utime(old, (0, 0))
    os.utime(theirs, (0, 0))
    files.remove_stale_temporaries(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {new.name, theirs.name}

"""labels.csv and its parts as files: what is read back, merged, and left alone."""

import errno
import os
from pathlib import Path

import pytest

from utils.serve import labels
from utils.utils import UserError


def test_rows_are_merged_and_files_of_similar_names_stay(tmp_path):
    mine = [
        "labels.csv.old.part1",
        "labels.csv.0-1.partial",
        "labels.csv.0-1.part0.zip",
        "labels.csv2.0-1.part0",
    ]
    for name in mine:
        (tmp_path / name).touch()
    (tmp_path / "labels.csv.0-2.part0").mkdir()
    out = tmp_path / "labels.csv"
    (tmp_path / "labels.csv.0-1.part0").write_text("a.jpg,cat,0.5\n", encoding="utf-8")
    rows = labels.merge(out, "0-1", ["a.jpg", "b.jpg"], ["path", "class", "probability"])
    assert list(rows) == ["a.jpg"]
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == sorted([*mine, "labels.csv", "labels.csv.0-2.part0"])


def test_a_row_is_kept_only_whole(tmp_path):
    part = tmp_path / "part"
    part.write_text('a.jpg,cat,0.5\n"b\nc.jpg",dog,0.7\nd.jpg,ca', encoding="utf-8", newline="")
    assert list(labels.read_rows(part, 3)) == ["a.jpg", "b\nc.jpg"]
    part.write_text('a.jpg,cat,0.5\n"b\n', encoding="utf-8", newline="")
    assert list(labels.read_rows(part, 3)) == ["a.jpg"]


def test_a_table_to_which_somebody_added_a_column_is_kept(tmp_path):
    out = tmp_path / "labels.csv"
    ours = ["path,class,probability\na.jpg,cat,0.500000\n", "", "\ufeffpath,class,probability\n"]
    ours += ["path,class,probability,cat,dog\na.jpg,cat,0.500000,0.500000,0.500000\n"]
    for text in ours:
        out.write_text(text, encoding="utf-8")
        assert labels.check_out(out) == out
    theirs = [
        "path,class,probability,note\na.jpg,cat,0.500000,see!\n",
        "path,class,probability\na.jpg,cat,mine\n",
    ]
    theirs += ["path,class\n", "path,class,probability\na.jpg,cat,0.500000,note\n"]
    for content in [*(text.encode() for text in theirs), b"\xff\xfe\0p", b"\0"]:
        out.write_bytes(content)
        with pytest.raises(UserError, match="no table of this script; name another file"):
            labels.check_out(out)
        assert out.read_bytes() == content


@pytest.mark.parametrize("windows", [False, True])
def test_any_field_and_any_name_is_read_back_as_it_was_written(tmp_path, monkeypatch, windows):
    errors = "surrogatepass" if windows else "surrogateescape"
    monkeypatch.setattr(labels, "TEXT", {**labels.TEXT, "errors": errors})
    name = "\ud83d half.jpg" if windows else "\udcff byte.jpg"
    row, part = [name, 'a "class"\rof\r\ntwo, or\nmore', "0.500000"], tmp_path / "part"
    header, plain = ["path", "cl\rass", "probability"], ["b.jpg", "cl\rass", "0.500000"]
    labels.write_rows(part, [header, row, plain])
    assert labels.read_rows(part, 3) == {"path": header, name: row, "b.jpg": plain}


def test_a_table_that_another_program_holds_open_is_said_before_anything_is_decoded(tmp_path, monkeypatch):
    opened, out = Path.open, tmp_path / "labels.csv"
    out.write_text("path,class,probability\n", encoding="utf-8")

    def held(path, mode="r", **options):
        if "+" in mode:  # Windows lets others read what is open in Excel, and no more
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, mode, **options)

    monkeypatch.setattr(Path, "open", held)
    monkeypatch.setattr(labels, "WINDOWS", True)
    with pytest.raises(PermissionError) as error:
        labels.check_out(out)
    assert error.value.filename == str(out)


@pytest.mark.skipif(os.name != "posix", reason="links and pipes of POSIX")
def test_links_lead_to_the_table_and_never_into_a_pipe(tmp_path):
    out, target = tmp_path / "labels.csv", tmp_path / "elsewhere"
    out.symlink_to(target)
    assert labels.check_out(out) == target.resolve()
    os.mkfifo(target)  # as /dev/stdout is, before `| less`
    with pytest.raises(UserError, match="is there and no table of this script; name another file"):
        labels.check_out(out)
    (tmp_path / "loop").symlink_to("loop")
    assert labels.check_out(tmp_path / "loop") == tmp_path.resolve() / "loop"

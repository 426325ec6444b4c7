"""Readers: what comes in is what comes out, and every bad file or row is named."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest

from lemo.errors import DataError
from lemo.train.documents import Turn
from lemo.train.sources import list_sources, read_documents, write_npz
from tests.train.tiny import words


def write_rows(path, rows):
    opener = gzip.open if path.name.endswith(".gz") else open
    with opener(path, "wt", encoding="utf-8") as file:
        for row in rows:
            file.write((row if isinstance(row, str) else json.dumps(row)) + "\n")
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_jsonl_rows_and_turns(tmp_path, name):
    rows = [
        {"text": "ünï one"},
        "",
        {"text": "two", "qas": [{"question": " why? ", "answers": [" so. ", "other"]}]},
    ]
    first, second = read_documents([write_rows(tmp_path / name, rows)])
    assert (first.text, first.turns) == ("ünï one", ())
    assert (second.text, second.turns) == ("two", (Turn("why?", "so."),))
    assert second.place.endswith(f"{name}, row 3")
    assert second.name == f"{name}:3"


def test_folder_is_read_in_order_and_txt_is_one_document(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("first\n\nstill first")
    (tmp_path / "sub" / "c.txt").write_text("third")
    (tmp_path / "notes.md").write_text("not data")
    assert [d.text for d in read_documents([tmp_path])] == ["first\n\nstill first", "second", "third"]


@pytest.mark.parametrize("largest", [65_535, 65_536])
def test_npz_round_trip_keeps_tokens_bounds_and_smallest_dtype(tmp_path, largest):
    documents = [[1, 2, largest], [7], list(range(100))]
    write_npz(tmp_path / "t.npz", documents)
    with np.load(tmp_path / "t.npz") as arrays:
        assert arrays["tokens"].dtype == (np.uint16 if largest < 65_536 else np.uint32)
    read = list(read_documents([tmp_path / "t.npz"]))
    assert [d.tokens_T.tolist() for d in read] == documents
    assert all(d.tokens_T.dtype == np.uint32 for d in read)


def test_datasets_folder(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"body": "one"}, {"body": "two"}])
    rows.save_to_disk(tmp_path / "rows")
    assert [d.text for d in read_documents([tmp_path / "rows"], text_field="body")] == ["one", "two"]
    with pytest.raises(DataError, match=r"row 1.*no field 'text'.*body"):
        list(read_documents([tmp_path / "rows"]))
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "both")
    with pytest.raises(DataError, match=r"several splits \(test, train\)"):
        list(read_documents([tmp_path / "both"]))
    assert len(list(read_documents([tmp_path / "both" / "train"], text_field="body"))) == 2


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"text": ', r"bad\.jsonl, row 2: not valid JSON"),
        ("[1]", r"bad\.jsonl, row 2: must be a JSON object"),
        ({"txt": "x"}, r"bad\.jsonl, row 2: has no field 'text' \(fields: txt\)"),
        ({"text": 3}, r"bad\.jsonl, row 2: field 'text' must be text, got int"),
        ({"text": " \n"}, r"bad\.jsonl, row 2: field 'text' is empty"),
        ({"text": "x", "qas": [{"answers": ["a"]}]}, r"row 2: item 1 of 'qas' has no question"),
        ({"text": "x", "qas": [{"question": "q", "answers": []}]}, r"row 2: item 1 of 'qas' has no answer"),
        ({"text": "x", "qas": "q"}, r"row 2: 'qas' must be a list|row 2: field 'qas'|'qas' must be a list"),
    ],
)
def test_bad_rows_are_named(tmp_path, bad, message):
    path = write_rows(tmp_path / "bad.jsonl", [{"text": "good"}, bad])
    with pytest.raises(DataError, match=message):
        list(read_documents([path]))


def test_files_that_cannot_be_read_are_named(tmp_path):
    def fails(name, content, message):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(DataError, match=message) as caught:
            list(read_documents([path]))
        assert str(path) in str(caught.value)

    fails("empty.txt", b" \n", "the file is empty")
    fails("latin.txt", b"caf\xe9 au lait", r"not UTF-8 text \(byte 3\)")
    fails("empty.jsonl", b"\n\n", "holds no documents")
    fails("latin.jsonl", b'{"text": "caf\xe9"}', "row 1: not UTF-8")
    good = gzip.compress(b'{"text": "one"}\n' * 2000)
    fails("cut.jsonl.gz", good[: len(good) // 2], "cannot be read")
    fails("notgzip.jsonl.gz", b"plain", "row 1: cannot be read")
    fails("x.csv", b"a,b", "cannot read this kind of file")
    fails("x.npz", b"no zip", "cannot be read as .npz")
    with pytest.raises(DataError, match="no such file"):
        list_sources([tmp_path / "absent.txt"])
    (tmp_path / "void").mkdir()
    with pytest.raises(DataError, match="void: the folder holds no"):
        list_sources([tmp_path / "void"])
    with pytest.raises(DataError, match="no data"):
        list_sources([])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"tokens": np.zeros(4, np.uint16)}, "no array bounds"),
        ({"tokens": np.zeros(4, np.int64), "bounds": np.array([0, 4])}, "uint16 or uint32"),
        ({"tokens": np.zeros(4, np.uint16), "bounds": np.array([0, 3])}, "end at 4"),
        ({"tokens": np.zeros(4, np.uint16), "bounds": np.array([0, 2, 2, 4])}, "row 2: the document is empty"),
        ({"tokens": np.zeros(4, np.uint16), "bounds": np.array([0.0, 4.0])}, "flat integer array"),
        ({"tokens": np.array([{}], dtype=object), "bounds": np.array([0, 1])}, r"cannot be read as \.npz"),
    ],
)
def test_bad_npz_is_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(DataError, match=message):
        list(read_documents([tmp_path / "bad.npz"]))


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([], "no documents"),
        ([[1], []], "document 1 must be"),
        ([[-1]], "outside uint32"),
        ([[2**32]], "outside uint32"),
    ],
)
def test_write_npz_refuses_what_it_cannot_store(tmp_path, documents, message):
    with pytest.raises(DataError, match=message):
        write_npz(tmp_path / "x.npz", documents)
    assert not (tmp_path / "x.npz").exists()


def test_damaged_archives_are_named(tmp_path):
    rows = "\n".join(json.dumps({"text": words(30, seed=i)}) for i in range(100))
    whole, said = gzip.compress(rows.encode(), mtime=0), []
    for place in range(100, len(whole), 100):
        (tmp_path / "a.jsonl.gz").write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        with pytest.raises(DataError, match=r"a\.jsonl\.gz, row \d+: ") as raised:
            list(read_documents([tmp_path / "a.jsonl.gz"]))
        said.append(str(raised.value))
    assert any("cannot be read (Error -3 while decompressing" in text for text in said)


def test_one_array_is_no_npz(tmp_path):
    with open(tmp_path / "a.npz", "wb") as file:
        np.save(file, np.arange(10, dtype=np.uint16))
    with pytest.raises(DataError, match=r"a\.npz: holds one array, as np\.save writes it"):
        list(read_documents([tmp_path / "a.npz"]))


def test_integers_that_python_does_not_read_are_named(tmp_path):
    row = '{"text": "abc", "id": ' + "9" * 5000 + "}"
    with pytest.raises(DataError, match=r"a\.jsonl, row 2: cannot be read \(Exceeds the limit"):
        list(read_documents([write_rows(tmp_path / "a.jsonl", ['{"text": "x"}', row])]))
    (tmp_path / "a.json").write_text(f"[{row}]")
    with pytest.raises(DataError, match=r"a\.json: cannot be read \(Exceeds the limit"):
        list(read_documents([tmp_path / "a.json"]))

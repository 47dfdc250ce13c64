"""A generated stream as files: they hold the stream, and the metadata say what they hold."""

import hashlib
import json

import pyarrow.parquet as pq
import pytest
import torch
from biographies import WORLD

from cl_bench.cli.croissant import METADATA, save, write
from cl_bench.data import MemoryData
from cl_bench.tasks.biography import Biography

SMALL = ["+stream=biography/smoke", "stream.people=12", "stream.new_people=4", "stream.strangers=2"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    stream = Biography(**WORLD)
    return stream, folder, write(stream, folder, "python -m cl_bench croissant=made")


def test_files_hold_the_stream(made):
    stream, folder, _ = made
    for task in stream:
        found = pq.read_table(folder / f"{task.name}-train.parquet")
        whole = task.train[torch.arange(len(task.train))]
        for name, value in whole.items():
            assert torch.equal(torch.tensor(found[name].to_pylist()), value), name
        text = found["prompt"][0].as_py() + found["answer"][0].as_py()
        read = whole["attention_mask"][0].bool() | (whole["labels"][0] >= 0)
        ids = whole["input_ids"][0][read].tolist()
        assert text == "".join(stream.vocabulary[i] for i in ids)
        assert text.endswith("<end>")


def test_the_metadata_name_every_file_and_every_column(made):
    _, folder, described = made
    assert json.loads((folder / METADATA).read_text()) == described
    files = {f["@id"]: f for f in described["distribution"]}
    assert set(files) == {p.name for p in folder.glob("*.parquet")}
    for name, file in files.items():
        content = (folder / name).read_bytes()
        assert file["sha256"] == hashlib.sha256(content).hexdigest()
        assert file["contentSize"] == f"{len(content)} B"
    for record in described["recordSet"]:
        (name,) = {field["source"]["fileObject"]["@id"] for field in record["field"]}
        columns = [field["source"]["extract"]["column"] for field in record["field"]]
        assert columns == pq.read_schema(folder / name).names
    assert described["license"] == "https://spdx.org/licenses/Apache-2.0.html"


def test_tensors_of_any_shape_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("cl_bench.cli.croissant.ROWS", 3)
    x, y = torch.randn(8, 1, 2, 3), torch.arange(8)
    _, shapes = save(MemoryData({"x": x, "y": y}), tmp_path / "a.parquet")
    found = pq.read_table(tmp_path / "a.parquet")
    assert shapes == {"x": [1, 2, 3]}
    assert torch.equal(torch.tensor(found["x"].to_pylist()).view(8, 1, 2, 3), x)
    assert torch.equal(torch.tensor(found["y"].to_pylist()), y)


def test_the_library_of_croissant_reads_it(made):
    mlcroissant = pytest.importorskip("mlcroissant")
    stream, folder, described = made
    found = mlcroissant.Dataset(folder / METADATA)
    assert not found.metadata.issues.errors
    record = described["recordSet"][0]["name"]
    first = next(iter(found.records(record_set=record)))
    ids = next(iter(stream)).train[torch.tensor([0])]["input_ids"][0]
    assert list(first[f"{record}/input_ids"]) == ids.tolist()


def test_the_command_line(cli, tmp_path):
    status, out, err = cli("croissant=made", *SMALL)
    assert status == 0, err
    assert "4 files and made/croissant.json" in out
    for words, said in (
        (("croissant=made", *SMALL), "name a folder that is not there yet"),
        (("croissant=other",), "no stream is named"),
        (("croissant=other", "+stream=permuted_digits"), "permuted_digits is not generated"),
    ):
        status, _, err = cli(*words)
        assert status == 2
        assert said in err
    assert not (tmp_path / "other").exists()

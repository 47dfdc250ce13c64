"""Encoder-decoders are exported whole, whether their output layer is tied or not."""

import sys

import pytest
import torch
from texts import make_stream

from cl_bench import run
from cl_bench.cli.export import export

transformers = pytest.importorskip("transformers")

TINY = (
    *("learner=language", "optimizer=adamw", "optimizer.lr=0.01", "batch_size=4"),
    *("model.depth=1", "model.width=16", "model.heads=2", "model.feed_forward=16"),
    *("trainer.max_epochs=1", "trainer.accelerator=cpu", "logger.mode=disabled"),
    "alignment.enabled=false",
)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(sys.modules["cl_bench.experiment.conduct"], "write_figures", lambda _: [])


@pytest.mark.parametrize("tied", [True, False])
def test_a_t5_answers_the_same_once_transformers_has_loaded_it(tmp_path, tied):
    overrides = (*TINY, f"model.tied={str(tied).lower()}", f"model.scaled={str(tied).lower()}")
    result = run(make_stream(), "finetune", "t5_tiny", overrides=overrides, run_dir=tmp_path / "r")
    model = result.learner.model.eval()
    assert (model.lm_head.weight is model.shared.weight) == tied
    asked = {
        "input_ids": torch.arange(20).reshape(2, 10),
        "decoder_input_ids": torch.arange(8).reshape(2, 4),
    }

    def answer(words):
        folder = export([f"export={tmp_path / 'r'}", *words])
        loaded = transformers.T5ForConditionalGeneration.from_pretrained(folder).eval()
        with torch.no_grad():
            return folder, loaded(**asked).logits

    folder, logits = answer([])
    with torch.no_grad():
        assert torch.equal(logits, model(**asked).logits)
    assert not torch.allclose(answer(["task=0"])[1], logits, atol=1e-2)
    # What its tokens stand for is known to the stream, which came as an object.
    card = (folder / "README.md").read_text()
    assert "T5ForConditionalGeneration.from_pretrained" in card
    assert "The stream was an object of Python code (cl_bench.tasks.text.stream.TextStream)" in card
    assert not (folder / "vocabulary.json").exists()

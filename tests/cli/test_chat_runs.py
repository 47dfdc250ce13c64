"""Own data from file to served model: three families, four strategies, loaded elsewhere."""

import json
import subprocess
import sys
from itertools import pairwise

import chats
import pytest
import torch
from chats import said, saved, write
from transformers import AutoModelForCausalLM, AutoTokenizer

from cl_bench import run
from cl_bench.cli.export import export
from cl_bench.contracts import UsageError
from cl_bench.tasks.chat import Chat
from cl_bench.tracking import read_results

SMALL = (
    *("trainer.max_epochs=1", "trainer.accelerator=cpu", "logger.mode=disabled", "batch_size=4"),
    *("alignment.enabled=false", "optimizer=adamw", "optimizer.lr=0.01", "learner=language"),
    *("model=hub", "eval.batch_size=8"),
)

STRATEGIES = {
    "finetune": (),
    "er": (),
    "adaptive_svd": (),
    "o_lora": ("strategy.rank=2", "strategy.targets=[q_proj,v_proj]"),
}


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(sys.modules["cl_bench.experiment.conduct"], "write_figures", lambda _: [])


def three_tasks(folder, family):
    """A chat file, a file of instructions, one of labels."""
    labels = [{"prompt": f"is {n}?", "completion": ("yes", "no")[n % 2]} for n in range(6)]
    told = [{"instruction": f"say {n}", "input": "", "output": str(n)} for n in range(6)]
    return Chat(
        [
            write(folder / "chat.jsonl", [said("hi", "yo", "so", "ok")] * 6),
            {"path": write(folder / "told.jsonl", told), "metric": "exact_match"},
            {"path": write(folder / "labels.jsonl", labels), "metric": "choice_likelihood"},
        ],
        tokenizer=str(saved(family)),
    )


def learned(tmp_path, family, strategy, *more):
    stream = three_tasks(tmp_path, family)
    words = (*SMALL, f"model.name_or_path={saved(family)}", *STRATEGIES[strategy], *more)
    return run(stream, strategy, overrides=words, run_dir=tmp_path / "run")


ASKED = torch.arange(24).reshape(2, 12)


def logits(model):
    with torch.no_grad():
        return model.eval()(ASKED).logits


def cast(model):
    """Its weights in bfloat16; rotary frequencies, which nobody stores, stay what they are."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return model


QUICK = {("llama", "finetune"), ("qwen3", "adaptive_svd"), ("gemma3", "er")}

PAIRS = [
    pytest.param(family, strategy, marks=[] if (family, strategy) in QUICK else pytest.mark.slow)
    for family in chats.FAMILIES
    for strategy in STRATEGIES
]


@pytest.mark.parametrize(("family", "strategy"), PAIRS)
def test_three_files_are_learned_and_served(family, strategy, tmp_path):
    result = learned(tmp_path, family, strategy)
    assert torch.isfinite(torch.tensor(result.matrix)).all()
    told = [
        task["metric"] for task in json.loads((tmp_path / "run/data.json").read_text())["tasks"]
    ]
    assert told == ["test_loss", "exact_match", "choice_likelihood"]
    assert torch.tensor(result.summary["acc"]).isnan()  # no mean over three kinds of scores
    end = result.summary["by_metric"]["exact_match"]["end"]
    assert end == pytest.approx(float(result.matrix[-1, 1]))
    losses = [e["details"] for e in read_results(tmp_path / "run") if e["event"] == "evaluation"]
    assert all(0 < one["chat"]["loss"] < 20 for one in losses)
    folder = export([f"export={tmp_path / 'run'}"])
    served = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert served.dtype == torch.bfloat16  # as the source keeps its own
    assert torch.equal(logits(served), logits(cast(result.learner.model)))
    words = AutoTokenizer.from_pretrained(folder)
    assert words.chat_template == chats.FAMILIES[family][0]
    ends = served.generation_config.eos_token_id
    assert ends[0] == result.learner.end
    assert words.eos_token_id in ends
    asked = words.apply_chat_template(
        said("hi")["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    given = served.generate(**asked, max_new_tokens=4, do_sample=False)
    assert given.shape[1] > asked["input_ids"].shape[1]
    if strategy == "finetune":
        with pytest.raises(UsageError, match=r"adapter=true: .*(no linear layer|has rank)"):
            export([f"export={tmp_path / 'run'}", "adapter=true"])
        assert [p.name for p in (tmp_path / "run" / "export").iterdir()] == ["task0003"]


def test_a_run_packs_batches_of_tokens_and_logs_its_steps(tmp_path):
    rows = [said("x" * (5 + 9 * i), "y" * (1 + 4 * i)) for i in range(20)]
    stream = Chat([write(tmp_path / "rows.jsonl", rows)], tokenizer=str(saved("llama")))
    more = ("learner.packing=true", "batch_tokens=700", "schedule=warmup", "log_steps=1")
    words = (*SMALL, f"model.name_or_path={saved('llama')}", *more)
    run(stream, "finetune", overrides=words, run_dir=tmp_path / "run")
    events = read_results(tmp_path / "run")
    (epoch,) = [e for e in events if e["event"] == "epoch"]
    steps = [e for e in events if e["event"] == "steps"]
    assert [e["batches"] for e in steps] == list(range(1, epoch["steps"] + 1))
    assert len(steps) > 4
    assert epoch["useful_tokens"] >= 0.95
    rates = [e["learning_rate"] for e in steps]
    assert rates[0] == 0  # it rises in the first step, then falls in a line
    gaps = [a - b for a, b in pairwise(rates[1:])]
    assert gaps == pytest.approx([0.01 / (len(steps) - 1)] * len(gaps))
    image = ("pack=1", "batch_tokens=100", "stream.num_tasks=2", "trainer.accelerator=cpu")
    with pytest.raises(UsageError, match=r"batch_tokens=.*only text has tokens"):
        run("permuted_digits", "finetune", overrides=image, run_dir=tmp_path / "other")


def test_a_low_rank_change_is_served_as_an_adapter(tmp_path):
    from peft import AutoPeftModelForCausalLM

    result = learned(tmp_path, "llama", "o_lora", "strategy.rank=1")
    folder = export([f"export={tmp_path / 'run'}", "adapter=true"])
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 3  # 1 a task
    served = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.allclose(logits(served), logits(result.learner.model), atol=1e-4)
    base = AutoModelForCausalLM.from_pretrained(saved("llama"), dtype=torch.float32)
    assert not torch.allclose(logits(base), logits(result.learner.model), atol=1e-2)
    first = export([f"export={tmp_path / 'run'}", "adapter=true", "task=1"])
    assert json.loads((first / "adapter_config.json").read_text())["r"] == 1


ELSEWHERE = """
import pathlib
import sys
from itertools import pairwise
def holds_us(place):
    return "site-packages" not in place and (pathlib.Path(place) / "cl_bench").exists()
sys.path = [place for place in sys.path if not holds_us(place)]
sys.modules["cl_bench"] = None  # however an installation in place finds it
try:
    import cl_bench
    raise SystemExit("cl_bench is there")
except ImportError:
    pass
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto").eval()
AutoTokenizer.from_pretrained(sys.argv[1]).apply_chat_template([{"role": "user", "content": "a"}])
with torch.no_grad():
    torch.save(model(torch.arange(24).reshape(2, 12)).logits, sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.parametrize("family", chats.FAMILIES)
def test_an_export_serves_where_we_are_not(family, tmp_path):
    result = learned(tmp_path, family, "finetune")
    for task in (1, 3):
        folder = export([f"export={tmp_path / 'run'}", f"task={task}"])
        subprocess.run(
            [sys.executable, "-c", ELSEWHERE, str(folder), str(tmp_path / f"{task}.pt")],
            check=True, cwd=tmp_path, env={"HF_HUB_OFFLINE": "1", "PATH": ""},
        )  # fmt: skip
    served = torch.load(tmp_path / "3.pt")
    assert torch.equal(served, logits(cast(result.learner.model)))
    assert not torch.equal(served, torch.load(tmp_path / "1.pt"))

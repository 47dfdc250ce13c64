"""``python -m cl_bench merge``: checkpoints merged from their files alone."""

import json
import os
import pickle
import sys

import pytest
import torch
from models import model
from safetensors.torch import load_file, save_file

import cl_bench.cli.merge as command
from cl_bench.cli import main
from cl_bench.cli.merge import merge
from cl_bench.cli.tensorfiles import Entry, Sequential
from cl_bench.contracts import UsageError
from cl_bench.merging import RULES, make_rule
from cl_bench.merging import merge as merged_at_once

SHAPES = {
    "h.0.weight": (7, 5),
    "h.1.weight": (6, 2, 3, 3),
    "h.1.bias": (6,),
    "embed.weight": (11, 4),
    "lm_head.weight": (11, 4),
}
MATRICES = {"h.0.weight", "h.1.weight"}


def single(seed):
    return {n: w.float() for n, w in model(seed, SHAPES).items()}


def save(folder, weights, licence=None, shards=1, config=True):
    folder.mkdir(parents=True)
    names = sorted(weights)
    parts = [names[i::shards] for i in range(shards)]
    files = [f"model-{i}.safetensors" if shards > 1 else "model.safetensors" for i in range(shards)]
    for file, part in zip(files, parts, strict=True):
        save_file({n: weights[n].contiguous() for n in part}, folder / file, {"format": "pt"})
    if shards > 1:
        where = {n: f for f, part in zip(files, parts, strict=True) for n in part}
        text = json.dumps({"metadata": {}, "weight_map": where})
        (folder / "model.safetensors.index.json").write_text(text)
    if config:
        (folder / "config.json").write_text('{"model_type": "toy"}')
    if licence:
        (folder / "README.md").write_text(f"---\nlicense: {licence}\n---\n# A model")
    return folder


@pytest.fixture
def pool(tmp_path):
    base = single(0)
    models = [{n: base[n] + 0.3 * single(t + 1)[n] for n in base} for t in range(3)]
    folders = [save(tmp_path / f"m{t}", m, "mit") for t, m in enumerate(models)]
    return base, models, save(tmp_path / "base", base, "mit"), folders


def words(base, folders, rule, to, *more):
    named = ",".join(map(str, folders))
    return [f"base={base}", f"models=[{named}]", f"rule={rule}", f"to={to}", *more]


def read(folder):
    found = {}
    for path in folder.glob("*.safetensors"):
        found.update(load_file(path))
    return found


@pytest.mark.parametrize("rule", sorted(RULES))
def test_from_files_it_is_what_it_is_in_memory(rule, pool, tmp_path):
    base, models, folder, folders = pool
    moments = more = None
    if rule == "ota":
        moments = [{n: w.square() for n, w in single(t + 9).items()} for t in range(3)]
        kept = [save(tmp_path / f"v{t}", m, config=False) for t, m in enumerate(moments)]
        more = f"moments=[{','.join(map(str, kept))}]"
    out = merge(words(folder, folders, rule, tmp_path / "out", *([more] if more else [])))
    wanted = merged_at_once(make_rule(rule, {}), base, models, MATRICES, moments)
    found = read(out)
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], atol=1e-6, rtol=1e-5)
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    assert not list(tmp_path.glob(".out*"))


def test_options_of_the_rule_and_patterns_are_words_too(pool, tmp_path):
    base, models, folder, folders = pool
    out = merge(
        words(folder, folders, "dare", tmp_path / "out", "inner=ties", "top=0.5", "drop=0.25",
              "scale=1", "seed=3", "skip=[lm_head*]", "vectors=['*h.1*', '*embed*']")
    )  # fmt: skip
    options = {"inner": "ties", "top": 0.5, "drop": 0.25, "scale": 1.0, "seed": 3}
    names = [n for n in base if n != "lm_head.weight"]
    wanted = merged_at_once(
        make_rule("dare", options),
        {n: base[n] for n in names},
        [{n: m[n] for n in names} for m in models],
        {"h.0.weight"},
    )
    found = read(out)
    assert torch.equal(found.pop("lm_head.weight"), base["lm_head.weight"])
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], atol=1e-6, rtol=1e-5)


def test_files_types_counters_and_statistics_are_as_in_the_base(tmp_path):
    def half(seed, count):
        weights = {n: w.bfloat16() for n, w in single(seed).items()}
        weights["bn.running_mean"] = torch.full((3,), float(count))
        weights["bn.num_batches_tracked"] = torch.tensor(count)
        weights["none"] = torch.zeros(0, 3)
        return weights

    base = save(tmp_path / "base", half(0, 10), shards=2)
    folders = [save(tmp_path / f"m{t}", half(t, 20 * t), shards=s) for t, s in ((1, 1), (2, 3))]
    out = merge(words(base, folders, "task_arithmetic", tmp_path / "out"))
    found = read(out)
    assert found["h.0.weight"].dtype == torch.bfloat16
    assert found["bn.num_batches_tracked"] == 10
    assert torch.equal(found["bn.running_mean"], torch.full((3,), 30.0))  # not by the rule
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert index == json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]


@pytest.mark.parametrize("rule", ["opcm", "ties", "iso_cts"])
def test_killed_at_any_tensor_it_goes_on_to_the_same_files(rule, pool, tmp_path, monkeypatch):
    _, _, folder, folders = pool
    whole = merge(words(folder, folders, rule, tmp_path / "whole"))
    append, seen = Sequential.append, []

    def dying(self, tensor):
        if self.done >= len(seen) % 4 + 1 and len(seen) < 9:
            os.pwrite(self._file, b"half a tensor", os.fstat(self._file).st_size)
            seen.append(self.done)
            raise KeyboardInterrupt
        append(self, tensor)

    monkeypatch.setattr(Sequential, "append", dying)
    again = words(folder, folders, rule, tmp_path / "out")
    for _ in range(9):
        with pytest.raises(KeyboardInterrupt) as interrupt:
            merge(again)
        assert "same command" in interrupt.value.__notes__[0]
        assert not (tmp_path / "out").exists()
    out = merge(again)
    for path in whole.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name


def test_what_is_written_is_not_written_again(pool, tmp_path, monkeypatch):
    _, _, folder, folders = pool
    asked, tensor = [], command._tensor

    def counting(order, entry, folding, factor):
        asked.append(entry.name)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return tensor(order, entry, folding, factor)

    monkeypatch.setattr(command, "_tensor", counting)
    with pytest.raises(KeyboardInterrupt):
        merge(words(folder, folders, "average", tmp_path / "out"))
    merge(words(folder, folders, "average", tmp_path / "out"))
    assert len(asked) == len(SHAPES) + 1


def test_an_unfinished_merge_of_something_else_is_not_gone_on_with(pool, tmp_path, monkeypatch):
    _, _, folder, folders = pool
    stopping = monkeypatch.context()
    with stopping as patch:
        patch.setattr(command, "_merge", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            merge(words(folder, folders, "opcm", tmp_path / "out"))
    for other in (
        words(folder, folders, "opcm", tmp_path / "out", "alpha=0.4"),
        words(folder, folders[:2], "opcm", tmp_path / "out"),
    ):
        with pytest.raises(UsageError, match="unfinished merge with other options or other files"):
            merge(other)
    assert merge(words(folder, folders, "opcm", tmp_path / "out")).is_dir()


def test_the_card_names_sources_and_licences_and_obeys_none_of_them(pool, tmp_path):
    _, _, folder, folders = pool
    card = (
        merge(words(folder, folders, "opcm", tmp_path / "out", "alpha=0.4")) / "README.md"
    ).read_text()
    assert "license: mit" in card
    assert "alpha=0.4" in card
    assert card.count("| mit |") == 4
    evil = "gpl-3.0 | [x](http://evil) \\u001b[31m"
    (folders[1] / "README.md").write_text(f'---\nlicense: "{evil}"\n---\n')
    (folders[2] / "README.md").write_text("no front matter")
    card = (merge(words(folder, folders, "opcm", tmp_path / "other")) / "README.md").read_text()
    assert "license:" not in card.split("---")[1]
    assert "\\[x\\](http://evil)" in card
    assert "\x1b" not in card
    assert "| not told |" in card


# -- refusals, before any work ---------------------------------------------------------------------


def refused(said, arguments, tmp_path):
    with pytest.raises(UsageError, match=said):
        merge(arguments)
    assert not list(tmp_path.glob(".out*")), "it began"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["rule=opmc"], "rule=opmc: there is no such rule.*Did you mean opcm"),
        (["rule=core_space"], "low-rank factors"),
        (["rule=fw"], "gradients"),
        (["rule=opcm", "alpha=2"], "alpha=2"),
        (["rule=opcm", "alpha=high"], "alpha=high"),
        (["rule=opcm", "top=0.2"], "top=0.2: rule=opcm takes alpha, scale"),
        (["rule=ties", "how=max"], "how=max"),
        (["rule=dare", "inner=dare"], "inner=dare"),
        (["rule=ota"], "only ota takes them, one safetensors"),
        (["rule=opcm", "skip=lm_head"], "skip=lm_head: a list"),
        (["rule=opcm", "rule=ties"], "each key once"),
        (["rule=opcm", "now"], "now: merge takes key=value"),
        ([], "rule= is missing"),
    ],
)
def test_words_that_mean_nothing_are_named(more, said, pool, tmp_path):
    _, _, folder, folders = pool
    given = [w for w in words(folder, folders, "x", tmp_path / "out") if not w.startswith("rule")]
    refused(said, [*given, *more], tmp_path)


def test_models_that_do_not_fit_are_named_with_the_tensor(pool, tmp_path):
    base, models, folder, folders = pool
    fewer = save(tmp_path / "fewer", {n: w for n, w in models[0].items() if n != "h.1.bias"})
    more = save(tmp_path / "more", {**models[0], "adapter": torch.zeros(2)})
    wide = save(tmp_path / "wide", {**models[0], "lm_head.weight": torch.zeros(12, 4)})
    for other, said in (
        (fewer, "fewer: has no h.1.bias"),
        (more, "base=.*: has no adapter, which is in models: .*more"),
        (wide, r"wide: lm_head.weight is \[12, 4\], and \[11, 4\]"),
    ):
        refused(said, words(folder, [folders[0], other], "opcm", tmp_path / "out"), tmp_path)
    out = merge(words(folder, [folders[0], wide], "opcm", tmp_path / "out", "skip=[lm_head*]"))
    assert torch.equal(read(out)["lm_head.weight"], base["lm_head.weight"])


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_hostile_files_are_refused_and_no_pickle_is_read(pool, tmp_path, monkeypatch):
    _, models, folder, folders = pool
    monkeypatch.chdir(tmp_path)
    bomb = tmp_path / "bomb"
    bomb.mkdir()
    (bomb / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    fake = tmp_path / "fake"
    fake.mkdir()
    (fake / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    short = save(tmp_path / "short", models[0])
    content = (short / "model.safetensors").read_bytes()
    (short / "model.safetensors").write_bytes(content[:-20])
    outside = save(tmp_path / "outside", models[0])
    index = {"weight_map": dict.fromkeys(SHAPES, "../m0/model.safetensors")}
    (outside / "model.safetensors.index.json").write_text(json.dumps(index))
    for other, said in (
        (bomb, "bomb: holds only pickles"),
        (bomb / "pytorch_model.bin", "never pickles"),
        (fake, "fake: model.safetensors cannot be read"),
        (short, "short: model.safetensors cannot be read"),
        (outside, "names no safetensors files of that folder"),
        (tmp_path / "nowhere", "nowhere: there is no such folder"),
    ):
        refused(said, words(folder, [folders[0], other], "opcm", tmp_path / "out"), tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_a_link_of_the_base_does_not_lead_out_of_its_cache(pool, tmp_path):
    _, _, folder, folders = pool
    deep = tmp_path / "one/two/three"
    deep.mkdir(parents=True)
    for name in ("model.safetensors", "config.json"):
        (deep / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "secret").write_text("secret")
    (deep / "tokenizer.json").symlink_to(tmp_path / "secret")
    (tmp_path / "one/vocab").write_text("a b")
    (deep / "vocab.txt").symlink_to(tmp_path / "one/vocab")
    out = merge(words(deep, folders, "average", tmp_path / "out"))
    assert not (out / "tokenizer.json").exists()
    assert (out / "vocab.txt").read_text() == "a b"


def test_a_tensor_that_holds_no_number_is_named(pool, tmp_path):
    _, models, folder, folders = pool
    bad = {n: w.clone() for n, w in models[0].items()}
    bad["h.0.weight"][0, 0] = torch.nan
    with pytest.raises(UsageError, match=r"bad: h.0.weight .* holds NaN"):
        merge(words(folder, [folders[0], save(tmp_path / "bad", bad)], "opcm", tmp_path / "out"))


def test_it_is_a_first_word_of_the_command_line(pool, tmp_path, monkeypatch, capsys):
    _, _, folder, folders = pool
    given = words(folder, folders, "opcm", tmp_path / "out")
    monkeypatch.setattr(sys, "argv", ["cl_bench", "merge", *given])
    assert main() == 0
    assert "3 models are merged in" in capsys.readouterr().out
    assert main() == 2
    assert "is there already: delete it" in capsys.readouterr().err


def test_a_written_file_is_what_the_library_reads(tmp_path):
    entries = [Entry("a", "F32", (2, 3)), Entry("none", "F16", (0,)), Entry("b", "I64", ())]
    with Sequential(tmp_path / "x.safetensors", entries) as file:
        file.append(torch.arange(6.0).reshape(3, 2).t())
        file.append(torch.zeros(0))
        file.append(torch.tensor(7))
    found = load_file(tmp_path / "x.safetensors")
    assert torch.equal(found["a"], torch.arange(6.0).reshape(3, 2).t())
    assert found["b"] == 7
    assert found["none"].shape == (0,)

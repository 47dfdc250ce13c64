"""Rows of strategies that keep samples of old tasks stand apart from others."""

from studies import make_run

from cl_bench.report.compare import to_csv
from cl_bench.report.study import read_study

LAST = [0.5, 0.6, 0.9]


def test_rows_that_keep_samples_are_a_block_of_their_own_with_the_bounds(tmp_path):
    for strategy, kept in (("finetune", 0), ("gpm", 0), ("er", 500), ("der", 200), ("joint", 0)):
        bound = {"finetune": "lower", "joint": "upper"}.get(strategy)
        facts = {"facts": {"bound": bound}} if bound else {}
        for seed in (0, 1):
            make_run(tmp_path / strategy / str(seed), strategy, seed, LAST, exemplars=kept, **facts)
    study = read_study([tmp_path])
    assert [(b.title, sorted(r.label for r in b.rows)) for b in study.blocks] == [
        ("digits", ["finetune", "gpm", "joint"]),
        ("digits with old samples kept", ["der", "er", "finetune", "joint"]),
    ]
    assert study.blocks[1].rows[1].upper.label == "joint"
    warnings = [w for w in study.blocks[1].warnings() if w.startswith("samples kept")]
    assert warnings == ["samples kept: 2.50 times, 200 (der) to 500 (er)"]
    assert "digits with old samples kept,der" in to_csv(study)
    assert not study.left_out


def test_what_is_said_twice_is_left_out_once(tmp_path):
    make_run(tmp_path / "er", "er", 0, LAST, exemplars=5)
    for again in ("a", "b"):
        make_run(tmp_path / again, "finetune", 0, LAST, exemplars=0, facts={"bound": "lower"})
    make_run(tmp_path / "gpm", "gpm", 0, LAST, exemplars=0)
    assert len(read_study([tmp_path]).left_out) == 1

"""Finished runs, made without learning anything."""

from omegaconf import OmegaConf

from cl_bench.tracking import open_record

NAMES = ["one", "two", "three"]


def make_run(directory, strategy, seed, last, known=False, status="completed", **more):
    settings = {
        "strategy": {"_target_": f"cl_bench.strategies.{strategy}", "threshold": 0.95},
        "stream": {"_target_": "cl_bench.tasks.s", "num_tasks": 3, "task_id_at_test": known},
        "seed": seed,
        "batch_size": 10,
        "run_dir": str(directory),
        **more.pop("settings", {}),
    }
    facts = {"stream": "digits", "strategy": strategy, "seed": seed, **more.pop("facts", {})}
    steps, data = more.pop("steps", 100), more.pop("data", None)
    with open_record(
        directory,
        NAMES,
        task_id_known=known,
        facts=facts,
        data=data,
        config=OmegaConf.to_yaml(OmegaConf.create(settings)),
        command=f"python -m cl_bench +strategy={strategy} seed={seed}",
    ) as record:
        record.row(0, None, dict.fromkeys(NAMES, 0.1), 0.1)
        record.row(1, 0, {"one": 0.9, "two": 0.1, "three": 0.1}, 0.1)
        record.layers(0, {"fc1": {"rank": 3 + seed, "capacity_left": 0.7}, "fc2": {"rank": 2}})
        record.row(2, 1, {"one": 0.8, "two": 0.9, "three": 0.1}, 0.1)
        record.layers(1, {"fc1": {"rank": 5, "capacity_left": 0.5, "applied_share": 0.1}})
        if status == "completed":
            record.row(3, 2, dict(zip(NAMES, last, strict=True)), 0.1)
        record.finish(
            status,
            optimizer_steps=steps,
            forward_samples=10 * steps,
            backward_samples=10 * steps,
            strategy_bytes=2048,
            inference_overhead=1.0,
            peak_memory_bytes=500_000_000,
            **more,
        )

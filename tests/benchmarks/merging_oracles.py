"""Our merge rules beside the functions that their authors published, on random matrices.

    python tests/benchmarks/merging_oracles.py --clones /path/to/clones

That folder holds git clones, bare or not, of tanganke/fusion_bench, danielm1405/iso-merging,
AntoAndGar/task_singular_vectors and apanariello4/core-space-merging, each under its own name.
Single functions are taken from their HEAD and run, without the packages that they come from;
nothing holds them back, so look at what you clone. Prints a line of JSON a comparison: the largest
difference of an entry over the largest entry, the worst of seeds 0, 1, 2.
"""

import argparse
import ast
import contextlib
import copy
import io
import json
import math
import subprocess
from collections import OrderedDict
from pathlib import Path
from types import MethodType, SimpleNamespace

import numpy as np
import torch
from torch import nn

from cl_bench.merging import (
    Folded,
    IsoC,
    IsoCts,
    Opcm,
    TaskArithmetic,
    Ties,
    TsvM,
    core_space,
    fold,
    merge,
    update,
)

SEEDS = (0, 1, 2)
MATRICES = {"tall": (48, 32), "wide": (32, 48), "square": (40, 40)}
SHAPES = {**MATRICES, "bias": (48,), "norm": (32,)}


class Clones:
    """Functions out of git clones."""

    def __init__(self, folder):
        self.folder = folder

    def git(self, repository, *words):
        place = ["git", "-C", str(self.folder / repository)]
        return subprocess.run([*place, *words], capture_output=True, text=True, check=True).stdout

    def commit(self, repository):
        return self.git(repository, "rev-parse", "HEAD").strip()[:7]

    def take(self, repository, path, names, space):
        """Put functions, or methods (``Class.name``), of a file into ``space``."""
        whole = ast.parse(self.git(repository, "show", f"HEAD:{path}"))
        for wanted in names:
            cls, _, name = wanted.rpartition(".")
            classes = [n for n in whole.body if isinstance(n, ast.ClassDef) and n.name == cls]
            body = classes[0].body if cls else whole.body
            (node,) = [n for n in body if isinstance(n, ast.FunctionDef) and n.name == name]
            node.returns = None
            for argument in (*node.args.args, *node.args.kwonlyargs):
                argument.annotation = None
            exec(compile(ast.Module([node], []), path, "exec"), space)
        return space


def random(seed, shapes):
    rng = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=rng, dtype=torch.float64) for n, s in shapes.items()}


def task_vectors(seed, count=4):
    return [random(seed + 100 * t + 1, SHAPES) for t in range(count)]


def ours(rule, vectors):
    folded = Folded()
    for deltas in vectors:
        folded = fold(rule, folded, deltas, MATRICES)
    return update(rule, folded, MATRICES)


def gap(found, wanted):
    return max(
        float((found[n].reshape(w.shape) - w).abs().max() / w.abs().max())
        for n, w in wanted.items()
    )


class Net(nn.Module):
    def __init__(self, seed):
        super().__init__()
        self.one, self.two, self.norm = nn.Linear(32, 48), nn.Linear(48, 40), nn.LayerNorm(40)
        self.double().load_state_dict(
            random(seed, {n: p.shape for n, p in self.named_parameters()})
        )


def opcm(clones, seed, count=6):
    def silent(*_, **__):
        return None

    space = {
        "torch": torch,
        "nn": nn,
        "np": np,
        "copy": copy,
        "OrderedDict": OrderedDict,
        "deepcopy": copy.deepcopy,
        "cast": lambda _, x: x,
        "tqdm": lambda x, **_: x,
        "CLIPVisionModelTaskPool": None,
        "_validate_state_dict_same_keys": silent,
    }
    for path, names in (
        ("utils/parameters.py", ["state_dict_to_vector"]),
        ("utils/state_dict_arithmetic.py", ["state_dict_sub"]),
        ("models/utils.py", ["is_leaf_module"]),
        ("method/opcm/utils.py", ["_svd", "svd", "get_task_vector_norm"]),
        (
            "method/opcm/opcm.py",
            [f"OPCMForCLIP.{n}" for n in ("run", "merge_linear_weights", "merge_other_parameters")],
        ),
    ):
        clones.take("fusion_bench", f"fusion_bench/{path}", names, space)
    base, nets = Net(seed), {str(t): Net(seed + 100 * t + 1) for t in range(count)}
    pool = SimpleNamespace(
        load_pretrained_model=lambda: copy.deepcopy(base),
        load_model=lambda name: copy.deepcopy(nets[name]),
        model_names=list(nets),
    )
    me = SimpleNamespace(
        seed=None,
        shuffle_order=False,
        alpha=0.5,
        save_on_every_step=False,
        evaluate_on_every_step=False,
        log_dir=None,
        profile=lambda _: contextlib.nullcontext(),
        fabric=SimpleNamespace(device="cpu", log=silent),
        _program=SimpleNamespace(taskpool=SimpleNamespace(_test_datasets={})),
        print_profile_summary=silent,
    )
    for name in ("merge_linear_weights", "merge_other_parameters"):
        setattr(me, name, MethodType(space[name], me))
    theirs, start = space["run"](me, pool).state_dict(), base.state_dict()
    models = [net.state_dict() for net in nets.values()]
    found = merge(Opcm(), start, models, {"one.weight", "two.weight"})
    return gap(*({n: w[n] - start[n] for n in start} for w in (found, theirs)))


def _authors(vectors):
    return [SimpleNamespace(vector=copy.deepcopy(v)) for v in vectors]


def _config():
    return SimpleNamespace(
        device="cpu", DATASETS=list("abcd"), method=SimpleNamespace(common_space_fraction=0.8)
    )


def iso(clones, seed, which, rule):
    space = {"torch": torch, "math": math}
    clones.take("iso-merging", "src/utils/iso.py", [which], space)
    vectors = task_vectors(seed)
    return gap(ours(rule, vectors), space[which](_authors(vectors), _config()))


def tsv_m(clones, seed):
    names = ["compute_svd_dict", "sum_svd_dict"]
    space = {"torch": torch}
    clones.take("task_singular_vectors", "src/utils/TSVM_utils.py", names, space)
    vectors, config = task_vectors(seed), _config()
    theirs = space["sum_svd_dict"](space["compute_svd_dict"](_authors(vectors), config), config)
    return gap(ours(TsvM(), vectors), theirs)


TIES = ["topk_values_mask", "resolve_zero_signs", "resolve_sign", "disjoint_merge", "ties_merging"]


def ties(clones, seed, how):
    path = "fusion_bench/method/ties_merging/ties_merging_utils.py"
    space = clones.take("fusion_bench", path, TIES, {"torch": torch})
    vectors = task_vectors(seed)
    rows = torch.stack([torch.cat([v[n].flatten() for n in SHAPES]) for v in vectors])
    found = ours(Ties(scale=1.0, how=how), vectors)
    flat = torch.cat([found[n].flatten() for n in SHAPES])
    return gap({"all": flat}, {"all": space["ties_merging"](rows, 0.2, how)})


def core(clones, seed, method, rule, flat=False):
    space = clones.take("core-space-merging", "merging_functions.py", TIES, {"torch": torch})
    methods = ["get_core_matrices", "_merge_tensors", "_process_ties", "get_tsv_delta_w"]
    names = [*(f"MatrixPerLayerMerger.{m}" for m in methods), "isotropize_matrix"]
    clones.take("core-space-merging", "task_merger.py", names, space)
    me = SimpleNamespace(cache={})
    for name in methods:
        setattr(me, name, MethodType(space[name], me))
    models = [random(seed + 10 * t, {"A": (4, 40), "B": (48, 4)}) for t in range(3)]
    config = {"merge_method": method, "topK": 20}
    pairs = [{"w": (m["A"], m["B"])} for m in models]
    cores, u, vh = me.get_core_matrices(pairs, "w", config)
    merged = me._merge_tensors(cores, config)
    if flat:
        merged = space["isotropize_matrix"](merged)
    return gap(core_space([{"w": (m["B"], m["A"])} for m in models], rule), {"w": u @ merged @ vh})


COMPARISONS = [
    ("opcm", "fusion_bench", "`OPCMForCLIP.run`, 6 models", opcm, ()),
    ("iso_c", "iso-merging", "`iso_c`", iso, ("iso_c", IsoC(rank_cut=0.0))),
    ("iso_cts", "iso-merging", "`iso_cts`", iso, ("iso_cts", IsoCts())),
    ("tsv_m", "task_singular_vectors", "`compute_svd_dict`, `sum_svd_dict`", tsv_m, ()),
    ("ties", "fusion_bench", "`ties_merging`, sum", ties, ("sum",)),
    ("ties", "fusion_bench", "`ties_merging`, mean", ties, ("mean",)),
    *(
        ("core_space", "core-space-merging", f"`MatrixPerLayerMerger`, {what}", core, arguments)
        for what, arguments in (
            ("sum", ("sum", TaskArithmetic(scale=1.0))),
            ("sum, isotropic", ("sum", IsoC(rank_cut=0.0), True)),
            ("TIES", ("ties", Ties(scale=1.0, how="mean"))),
            ("TSV", ("tsv", TsvM())),
        )
    ),
]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clones", type=Path, required=True)
    clones = Clones(parser.parse_args().clones)
    for rule, repository, what, compare, arguments in COMPARISONS:
        with contextlib.redirect_stdout(io.StringIO()):  # the authors' functions say what they do
            largest = max(compare(clones, seed, *arguments) for seed in SEEDS)
        row = {"rule": rule, "repository": repository, "at": clones.commit(repository)}
        print(json.dumps({**row, "what": what, "gap": float(f"{largest:.1e}")}))


if __name__ == "__main__":
    main()

"""What adaptive SVD costs on a language model of T5-small's size: `make bench-svd`.

Random weights and random tokens, no padding, no dropout, AdamW, gradient not accumulated; targets
are self-attention and MLP (72 matrices, 37.7 of 60.5 million parameters), everything else trains
freely in every contender but PEFT's, which freezes it. One process, contenders in turn; seconds are
those of the process's threads, so that a busy host disturbs less, medians over rounds.

* ``free``: full fine-tuning, a bare PyTorch loop.
* ``projected_param``, ``dense_projected``, ``factored``: the strategy's, in that loop.
* ``factorised linear``: layers that compute x V diag(s) U^T from six factors, whose gradients and
  which themselves are projected around the step (what mini_trainer does).
* ``PEFT OSF``: PEFT's layer; ``rest frozen``: ``projected_param`` with all else frozen, as PEFT has
  it.

Also: peak memory (each contender in a child process), decoding before and after a task, and the
time it takes to split all matrices of a model. On a machine with a CUDA device the same for a model
of T5-large's size and a LLaMA of a billion parameters in bfloat16; not seen here.
"""

import argparse
import functools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cl_bench.experiment.budget import PeakMemory
from cl_bench.learners import NetworkServices
from cl_bench.strategies.svd.adaptive_svd import AdaptiveSVD
from cl_bench.subspace import spectra

BAR = 1.15
"""A ``projected_param`` step at 4,096 tokens, as a multiple of a free one."""
OSF = "PEFT OSF"
LINEAR = "factorised linear"
OURS = ("projected_param", "dense_projected", "factored")
FROZEN = "rest frozen"
SHARES = (0.5, 0.8)
TARGETS = {"small": {(512, 512): 48, (2048, 512): 12, (512, 2048): 12}}
TARGETS["large"] = {(1024, 1024): 192, (4096, 1024): 48, (1024, 4096): 48}
"""Shapes of the matrices of a T5, and how many there are."""
SEQUENCES = {1024: 4, 4096: 16, 8192: 32}
SOURCE, ANSWER = 224, 32
"""A sequence's tokens: 256."""


def t5(size: str) -> nn.Module:
    """A T5 of a published size with random weights."""
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {
        "tiny": {"d_model": 64, "d_ff": 256, "num_layers": 2, "num_heads": 4, "d_kv": 16},
        "small": {"d_model": 512, "d_ff": 2048, "num_layers": 6, "num_heads": 8, "d_kv": 64},
        "large": {"d_model": 1024, "d_ff": 4096, "num_layers": 24, "num_heads": 16, "d_kv": 64},
    }
    torch.manual_seed(0)
    config = T5Config(vocab_size=32128, decoder_start_token_id=0, dropout_rate=0.0, **sizes[size])
    return T5ForConditionalGeneration(config)


def llama() -> nn.Module:
    """A LLaMA of 1.1 billion parameters with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=32,
    )
    return LlamaForCausalLM(config)


def batch_of(model: nn.Module, tokens: int, device: str) -> dict[str, Tensor]:
    """Random tokens, ``tokens`` of them."""
    rng = torch.Generator().manual_seed(1)
    n = SEQUENCES[tokens]
    made = {"input_ids": torch.randint(5, 32000, (n, SOURCE), generator=rng)}
    made["labels"] = torch.randint(5, 32000, (n, ANSWER), generator=rng)
    if not model.config.is_encoder_decoder:
        whole = torch.cat(list(made.values()), dim=1)
        made = {"input_ids": whole, "labels": whole}
    return {name: value.to(device) for name, value in made.items()}


class Services(NetworkServices):
    """A model of transformers as the strategy sees it."""

    batch_size, seed = 1, 0

    def __init__(self, model: Any) -> None:
        self.model = model
        self.held_norms = set()
        self.parameters = model.parameters

    @property
    def network(self) -> nn.Module:
        """The model."""
        return self.model

    def blocks(self) -> list[nn.Module]:
        """Encoder's and decoder's, or the only ones."""
        body = self.model.base_model
        if self.model.config.is_encoder_decoder:
            return [*body.encoder.block, *body.decoder.block]
        return list(body.layers)

    def is_guarded_head(self, name: str, heads: str) -> bool | None:
        """The output layer."""
        return heads != "never" if name == "lm_head" else None

    def loss(self, out: Tensor, batch: Any) -> Tensor:
        """Not asked for."""
        raise NotImplementedError

    label_logits = loss


class First:
    """A first task, as much of it as the strategy looks at."""

    index = 0


class Free:
    """Full fine-tuning."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(self.groups(), lr=1e-4)

    def groups(self) -> Any:
        """What the optimizer steps."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def step(self, batch: dict[str, Tensor]) -> None:
        """A whole training step."""
        self.optimizer.zero_grad()
        self.model(**batch).loss.backward()
        self.constrain()
        self.optimizer.step()
        self.after()

    def constrain(self) -> None:
        """Nothing."""

    after = constrain


class Ours(Free):
    """The strategy's hooks around the same step."""

    def __init__(
        self, model: nn.Module, parametrisation: Any, share: float, rest: Any = "all"
    ) -> None:
        self.learner: Any = Services(model)
        self.strategy = AdaptiveSVD(
            preserve_ratio=share,
            start_task=0,
            parametrisation=parametrisation,
            train_rest=rest,
        )
        begun = time.perf_counter()
        self.strategy.setup(self.learner, First())  # type: ignore[arg-type]
        super().__init__(model)
        self.seconds = time.perf_counter() - begun

    def groups(self) -> Any:
        """The strategy's."""
        return [g for g in self.strategy.param_groups(self.learner) if g["params"]]

    def constrain(self) -> None:
        """Gradients to the core."""
        self.strategy.constrain(self.learner)

    def after(self) -> None:
        """The core to weights."""
        self.strategy.after_step(self.learner, {}, torch.empty(0))


class FactorisedLinear(nn.Module):
    """x -> x V diag(s) U^T, with the leading triplets frozen."""

    def __init__(self, linear: nn.Linear, share: float) -> None:
        super().__init__()
        W = linear.weight.detach()
        ((_, spectrum),) = spectra([W])
        k = int(share * min(W.shape))
        split = spectrum.split(k, low=True)
        s = split.values.to(W.dtype)
        self.high = nn.ParameterList([split.U_h, s[:k], split.V_h]).requires_grad_(False)
        self.low = nn.ParameterList([split.U_l, s[k:], split.V_l])
        self.weight = None  # T5 asks for its dtype

    def forward(self, x: Tensor) -> Tensor:
        """Both parts."""
        U_h, s_h, V_h = self.high
        U_l, s_l, V_l = self.low
        return (x @ V_h * s_h) @ U_h.t() + (x @ V_l * s_l) @ U_l.t()

    @torch.no_grad()
    def project(self, what: Callable[[Tensor], Tensor]) -> None:
        """Take the leading directions out of the low factors, or of their gradients."""
        for high, low in ((self.high[0], self.low[0]), (self.high[2], self.low[2])):
            X = what(low)
            X.sub_(high @ (high.t() @ X))


class Factorised(Free):
    """Factorised layers."""

    def __init__(self, model: nn.Module, share: float) -> None:
        names = [m.name for m in AdaptiveSVD().targets(Services(model))]
        self.layers = []
        for name in names:
            parent, _, child = name.rpartition(".")
            made = FactorisedLinear(model.get_submodule(name), share)
            setattr(model.get_submodule(parent), child, made)
            self.layers.append(made)
        super().__init__(model)

    def constrain(self) -> None:
        """Gradients."""
        for layer in self.layers:
            layer.project(lambda p: p.grad)

    def after(self) -> None:
        """Factors."""
        for layer in self.layers:
            layer.project(lambda p: p.data)


def peft_osf(model: nn.Module, share: float) -> Free:
    """PEFT's layer on the same matrices; it freezes everything else."""
    from peft import OSFConfig, get_peft_model

    names = [m.name for m in AdaptiveSVD().targets(Services(model))]
    return Free(get_peft_model(model, OSFConfig(target_modules=names, effective_rank=share)))


def contender(name: str, share: float, model: nn.Module) -> Free:
    """By name."""
    if name == "free":
        return Free(model)
    if name in OURS:
        return Ours(model, name, share)
    if name == FROZEN:
        return Ours(model, OURS[0], share, "none")
    return Factorised(model, share) if name == LINEAR else peft_osf(model, share)


def timed(run: Callable[[], Any], device: str) -> float:
    """Seconds of the process's threads; of the clock on an accelerator."""
    if device == "cpu":
        begun = time.process_time()
        run()
        return time.process_time() - begun
    torch.cuda.synchronize()
    begun = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - begun


def steps(
    make: Callable[[], nn.Module],
    names: Sequence[str],
    shares: Sequence[float],
    tokens: int,
    rounds: int,
    device: str = "cpu",
) -> Iterator[tuple[str, float, float, float]]:
    """Time steps; yields contender, share, seconds a step, ratio to the free step beside it."""
    made: dict[tuple[str, float], Free] = {("free", 0.0): Free(make().to(device))}
    for name in names:
        for share in shares:
            made[name, share] = contender(name, share, make().to(device))
    batch = batch_of(made["free", 0.0].model, tokens, device)
    seconds: dict[tuple[str, float], list[float]] = {key: [] for key in made}
    for number in range(rounds + 1):
        for key, one in made.items():
            taken = timed(lambda one=one: one.step(batch), device)
            if number:  # the first one allocates
                seconds[key].append(taken)
    free = seconds["free", 0.0]
    for (name, share), taken in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(taken, free, strict=True))
        yield name, share, statistics.median(taken), ratio


def report_steps(rows: Iterator[tuple[str, float, float, float]], bar: float | None) -> None:
    """Print what :func:`steps` yields."""
    for name, share, seconds, ratio in rows:
        kept = f"{share:.1f}" if share else "   "
        line = f"  {name:18} {kept}  {seconds:8.3f} s  {ratio:6.3f}x"
        if bar and name == "projected_param":
            line += f"  bar {bar:.2f}x: {'met' if ratio <= bar else 'missed'}"
        print(line, flush=True)


def decoding(rounds: int, size: str, tokens: int = 32) -> None:
    """Greedy decoding of the plain model, and of one that learns a task."""
    models = {"free": Free(t5(size))}
    models |= {name: contender(name, 0.5, t5(size)) for name in (OURS[0], LINEAR, OSF)}
    batch = batch_of(models["free"].model, 1024, "cpu")
    taken: dict[str, list[float]] = {name: [] for name in models}
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    for one in models.values():
        one.step(batch)
        one.model.eval()
    for number in range(rounds + 1):
        for name, one in models.items():
            seconds = timed(
                lambda one=one: one.model.generate(input_ids=batch["input_ids"], **options), "cpu"
            )
            if number:
                taken[name].append(seconds)
    print(f"\ndecoding {tokens} tokens for {len(batch['input_ids'])} inputs, during a task")
    for name, seconds in taken.items():
        ratios = sorted(a / b for a, b in zip(seconds, taken["free"], strict=True))
        print(
            f"  {name:18}      {statistics.median(seconds):8.3f} s  "
            f"{statistics.median(ratios):6.3f}x  ({ratios[0]:.3f} ... {ratios[-1]:.3f})",
            flush=True,
        )


def memory(size: str, tokens: int) -> None:
    """Peak resident memory of two steps, each contender in a child process."""
    print(
        f"\npeak memory at {tokens} tokens, share 0.5: all of the process, and above one that idles"
    )
    idle = _child("idle", size, tokens)
    for name in ("free", *OURS, LINEAR, FROZEN, OSF):
        peak = _child(name, size, tokens)
        print(f"  {name:18}      {peak:8.2f} GiB  {peak - idle:6.2f} GiB", flush=True)


def _child(name: str, size: str, tokens: int) -> float:
    command = [sys.executable, __file__, "--child", name, "--size", size, "--tokens", str(tokens)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(out.splitlines()[-1])


def child(name: str, size: str, tokens: int) -> None:
    """Two steps of one contender; prints its peak resident memory in GiB."""
    import peft  # noqa: F401
    import transformers  # noqa: F401

    held = PeakMemory()  # the mark that the parent left would count
    if name != "idle":
        one = contender(name, 0.5, t5(size))
        batch = batch_of(one.model, tokens, "cpu")
        for _ in range(2):
            one.step(batch)
    print(held.read()["peak_memory_bytes"] / 2**30)


def decomposition(sizes: Sequence[str], device: str = "cpu") -> None:
    """Time to split all matrices of a T5 at half, and of torch's SVD of one of each shape."""
    print("\nsplitting all matrices at half their rank")
    for size in sizes:
        ours = full = 0.0
        count = 0
        for shape, number in TARGETS[size].items():
            rng = torch.Generator().manual_seed(2)
            left = number
            while left:  # as many at a time as fit comfortably in memory
                part = min(left, 24)
                matrices = [torch.randn(shape, generator=rng).to(device) for _ in range(part)]
                ours += timed(
                    lambda m=matrices: [s.split(min(m[0].shape) // 2) for _, s in spectra(m)],
                    device,
                )
                left -= part
            full += number * timed(
                lambda m=matrices: torch.linalg.svd(m[0], full_matrices=False), device
            )
            count += number
        print(
            f"  T5-{size:8} {count:4} matrices  {ours:8.1f} s   torch.linalg.svd in float32 "
            f"{full:8.1f} s (one of each shape, times their number)",
            flush=True,
        )


def on_cuda(rounds: int) -> None:
    """Step time, peak memory and decomposition in bfloat16 on the device at hand."""
    print(f"\n{torch.cuda.get_device_name()}, bfloat16 weights, 8192 tokens")
    for title, make in (("T5-large size", lambda: t5("large")), ("LLaMA 1.1 B", llama)):
        print(title)
        for name in ("free", OURS[0], LINEAR, OSF):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            one = contender(name, 0.5, make().to("cuda", torch.bfloat16))
            batch = batch_of(one.model, 8192, "cuda")
            one.step(batch)
            run = functools.partial(one.step, batch)
            took = [timed(run, "cuda") for _ in range(rounds)]
            peak = torch.cuda.max_memory_allocated() / 2**30
            split = f"  split in {one.seconds:.1f} s" if isinstance(one, Ours) else ""
            median = 1e3 * statistics.median(took)
            print(f"  {name:18} {median:9.1f} ms  {peak:6.2f} GiB{split}", flush=True)
            del one, run
    decomposition(["small", "large"], "cuda")


def main() -> None:
    """Run everything that the machine can."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--size", default="small", choices=("tiny", "small"))
    parser.add_argument("--tokens", type=int, default=0, help="0: 4096, then 1024")
    parser.add_argument(
        "--only", default="steps,others,decoding,memory,decomposition,cuda", help="parts, by comma"
    )
    parser.add_argument("--split", default="small,large", help="T5s to decompose, by comma")
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.child:
        child(given.child, given.size, given.tokens)
        return
    parts = given.only.split(",")
    load = "/".join(f"{x:.1f}" for x in os.getloadavg())
    print(f"torch {torch.__version__}, {given.threads} thread, load {load}, {Path(__file__).name}")
    if "steps" in parts:
        for tokens in [given.tokens] if given.tokens else [4096, 1024]:
            print(f"\na step at {tokens} tokens, T5-{given.size} size", flush=True)
            made = steps(lambda: t5(given.size), OURS[:1], SHARES, tokens, given.rounds)
            report_steps(made, BAR if tokens == 4096 else None)
    if "others" in parts:
        tokens = given.tokens or 1024
        print(f"\nother ways, at {tokens} tokens", flush=True)
        others = (*OURS[1:], LINEAR, FROZEN, OSF)
        report_steps(steps(lambda: t5(given.size), others, (0.5,), tokens, given.rounds), None)
    if "decoding" in parts:
        decoding(given.rounds, given.size)
    if "memory" in parts:
        memory(given.size, given.tokens or 4096)
    if "decomposition" in parts:
        decomposition(given.split.split(","))
    if "cuda" in parts:
        if torch.cuda.is_available():
            on_cuda(given.rounds)
        else:
            print("\nno CUDA device: T5-large's size and LLaMA in bfloat16 were not measured")


if __name__ == "__main__":
    main()

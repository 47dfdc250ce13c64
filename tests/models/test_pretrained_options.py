"""What a pretrained model is loaded as: type of numbers, compiled blocks, Liger's kernels."""

import functools

import pytest
import torch
from chats import said, saved, write
from torch.optim import SGD

from cl_bench.contracts import Protect, UsageError
from cl_bench.learners import language
from cl_bench.learners.guards import guards
from cl_bench.models import pretrained
from cl_bench.strategies.baselines.finetune import Finetune
from cl_bench.strategies.projection.gpm import GPM
from cl_bench.tasks.chat import Chat

pytest.importorskip("transformers")


@pytest.fixture
def stream(tmp_path):
    rows = [said("hi", "yo", "so", "ok"), said("a longer question", "no")] * 4
    return Chat(
        [write(tmp_path / "rows.jsonl", rows)], str(saved("llama")), validation_fraction=0.0
    )


def learner_of(stream, **options):
    model = pretrained(str(saved("llama")), **options)
    return language(stream, model, functools.partial(SGD, lr=0.1), batch_size=4, seed=0)


def test_weights_have_the_type_that_was_asked_for(stream):
    plain = learner_of(stream)
    half = learner_of(stream, dtype="bfloat16")
    assert {p.dtype for p in plain.parameters()} == {torch.float32}
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    for name, p in half.named_parameters():  # as they were saved
        assert torch.equal(p.float(), dict(plain.named_parameters())[name])
    assert guards(Finetune(), half) is None
    with pytest.raises(UsageError, match=r"GPM cannot guard weights in half precision.*float32"):
        guards(GPM(), half)


def step(learner, batch):
    learner.zero_grad()
    loss = learner.loss(learner.outputs(batch), batch)
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in learner.parameters()]


def same(found, wanted):
    torch.testing.assert_close(found[0], wanted[0])
    for a, b in zip(found[1], wanted[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def compiled_is_eager(stream, backend):
    eager, compiled = learner_of(stream), learner_of(stream, compile=backend)
    batch = stream[0].train[torch.arange(4)]
    same(step(compiled, batch), step(eager, batch))
    layers = [m for m in eager.layers(Protect()) if "mlp" in m.name][:1]
    same_layer = [m for m in compiled.layers(Protect()) if m.name == layers[0].name]
    before, after = eager.tap(layers, [batch]), compiled.tap(same_layer, [batch])
    name = layers[0].name
    torch.testing.assert_close(after[name].gram, before[name].gram)

    def halved(module, given):  # put on when the program is there already
        return (given[0] / 2,)

    for layer in (layers[0], same_layer[0]):
        layer.module.register_forward_pre_hook(halved)
    changed = step(compiled, batch)
    assert not torch.allclose(changed[0], step(learner_of(stream), batch)[0])
    same(changed, step(eager, batch))
    assert "forward" not in vars(compiled.blocks()[0])
    assert compiled.snapshot() is not None


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", True])
def test_compiled_blocks_compute_the_same_with_what_is_hooked_into_them(stream, backend):
    compiled_is_eager(stream, backend)


def test_liger_wants_cuda():
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(UsageError, match=r"model\.liger=true: .* CUDA device.*model\.liger=false"):
        pretrained(str(saved("llama")), liger=True)

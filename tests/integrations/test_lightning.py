"""A LightningModule as public templates have it: replay, penalties, objectives, groups, heads."""

import copy
import functools

import lightning
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from loops import own_cache, trainer  # noqa: F401
from torch import nn
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader, TensorDataset

from cl_bench.contracts import UsageError
from cl_bench.integrations import ContinualCallback, Guarded
from cl_bench.strategies.isolation.packnet import PackNet
from cl_bench.strategies.penalty.ewc import EWC
from cl_bench.strategies.projection.adam_nscl import AdamNSCL
from cl_bench.strategies.projection.gpm import GPM
from cl_bench.strategies.projection.rogo import ROGO
from cl_bench.strategies.replay.er import ER
from cl_bench.strategies.svd.adaptive_svd import AdaptiveSVD

EPOCHS, BATCH = 2, 8


def data(t, n=32):
    rng = torch.Generator().manual_seed(t)
    directions = torch.linalg.qr(torch.randn(12, 12, generator=rng))[0][:, :4].double()
    y = torch.arange(n) % 3
    z = 2 * torch.randn(3, 4, generator=rng).double()[y]
    return (z + 0.3 * torch.randn(n, 4, generator=rng).double()) @ directions.t(), y


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU()).double()


class LitClassifier(lightning.LightningModule):
    """An encoder, a head, a learning rate; shared steps, logged."""

    def __init__(self, encoder, learning_rate=0.05, optimizer=SGD, schedule=False, **options):
        super().__init__()
        self.save_hyperparameters(ignore=["encoder"])
        self.encoder = encoder
        torch.manual_seed(2)
        self.head = nn.Linear(16, 3).double()
        self.make = functools.partial(optimizer, lr=learning_rate, **options)
        self.schedule = schedule

    def forward(self, x):
        return self.head(self.encoder(x))

    def _shared_step(self, batch, stage):
        x, y = batch
        logits = self(x)
        loss = F.cross_entropy(logits, y)
        self.log(f"{stage}/loss", loss)
        self.log(f"{stage}/acc", (logits.argmax(1) == y).float().mean())
        return loss

    def training_step(self, batch, batch_idx):
        return {"loss": self._shared_step(batch, "train"), "size": len(batch[1])}

    def configure_optimizers(self):
        optimizer = self.make(self.parameters())
        if not self.schedule:
            return optimizer
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)]


def loader(t):
    return DataLoader(TensorDataset(*data(t)), batch_size=BATCH)


def plain(model, strategy):
    guard = Guarded(model, strategy, loss=F.cross_entropy, heads=["head"])
    for t in range(2):
        x, y = data(t)
        with guard.task(sample=(x, y), epochs=EPOCHS, steps=EPOCHS * len(x) // BATCH):
            optimizer = SGD(guard.param_groups(), lr=0.05)
            for _ in range(EPOCHS):
                for i in range(0, len(x), BATCH):
                    model.train()
                    batch = guard.on_batch((x[i : i + BATCH], y[i : i + BATCH]))
                    out = model(batch["x"])
                    optimizer.zero_grad()
                    loss = guard.objective(batch, out) + guard.penalty(batch, out)
                    loss.backward()
                    optimizer.step()
                guard.after_epoch()
    return guard


STRATEGIES = {
    "ewc": lambda: EWC(10.0, samples=16),
    "er": lambda: ER(16),
    "adam_nscl": lambda: AdamNSCL(50.0, samples=16, later_rate=0.02, head_rate=0.1),
    "rogo": lambda: ROGO(threshold=0.97, cosine=0.5, samples=16, relax_samples=16),
    "adaptive_svd": AdaptiveSVD,
}


@pytest.mark.parametrize("schedule", [False, True])
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_trainer_makes_the_weights_of_a_plain_loop(name, schedule):
    module = LitClassifier(network(), schedule=schedule)
    twin = copy.deepcopy(module)
    start = {k: v.clone() for k, v in module.state_dict().items()}
    plain(twin, STRATEGIES[name]())
    guard = Guarded(module, STRATEGIES[name](), loss=F.cross_entropy, heads=["head"])
    for t in range(2):
        callback = ContinualCallback(guard, sample=data(t))
        trainer(callback, epochs=EPOCHS).fit(module, loader(t))
    assert "training_step" not in vars(module)
    found, wanted = module.state_dict(), twin.state_dict()
    assert found.keys() == wanted.keys() == start.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, atol=1e-9, rtol=1e-9)
    assert any(not torch.equal(found[k], v) for k, v in start.items())


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-8), (torch.float32, 1e-4)])
def test_old_logits_stay_in_a_strangers_module(dtype, bound):
    moved = {}
    how = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
    for guarded in (True, False):
        torch.manual_seed(4)
        body = nn.Sequential(nn.Linear(24, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 16))
        module = LitClassifier(body, 0.02, AdamW, weight_decay=0.1).to(dtype)
        strategy = GPM(threshold=1.0, samples=4)
        sets = []
        for t, n in ((0, 4), (1, 24)):
            rng = torch.Generator().manual_seed(t)
            y = torch.arange(n) % 3
            sets.append((torch.randn(n, 24, generator=rng).to(dtype), y))
        for t, (x, y) in enumerate(sets):
            callback = ContinualCallback(strategy, sample=(x, y), task=t)
            loads = DataLoader(TensorDataset(x, y), batch_size=4)
            if t == 1:
                module.eval()
                said = module(sets[0][0]).detach()
                begun = float(F.cross_entropy(module(x).detach(), y))
            callbacks = [callback] if guarded or t == 0 else []
            trainer(*callbacks, epochs=2 if t == 0 else 60, **how).fit(module, loads)
        module.eval()
        moved[guarded] = float((module(sets[0][0]).detach() - said).norm() / said.norm())
        assert float(F.cross_entropy(module(x).detach(), y)) < begun / 2
    assert moved[True] < bound
    assert moved[False] > 100 * moved[True]


class Parts(LitClassifier):
    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.head(self.encoder(x)), y)


class Manual(LitClassifier):
    def __init__(self, encoder):
        super().__init__(encoder)
        self.automatic_optimization = False


def test_modules_that_a_callback_cannot_read():
    for module, said in (
        (Parts(network()), r"has not called self\(x\)"),
        (Manual(network()), "manual optimization"),
    ):
        callback = ContinualCallback(ER(8), sample=data(0), task=0)
        with pytest.raises(UsageError, match=said):
            trainer(callback, epochs=1).fit(module, loader(0))
        assert "training_step" not in vars(module)
    with pytest.raises(UsageError, match="in phases"):
        ContinualCallback(PackNet(), sample=data(0), task=0)
    callback = ContinualCallback(Guarded(network(), GPM()), sample=data(0))
    with pytest.raises(UsageError, match="another module"):
        trainer(callback, epochs=1).fit(LitClassifier(network()), loader(0))

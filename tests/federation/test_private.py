"""What the server may see: sums, masked if wanted."""

import math
from collections.abc import Mapping

import pytest
import torch
from federations import SKETCHES, learn, split, total
from toys import make_learner, make_stream, weights

from cl_bench.contracts import UsageError
from cl_bench.federation import (
    Federation,
    MaskedReducer,
    PlainReducer,
    Upload,
    client_statistics,
    server_end_task,
    site,
)
from cl_bench.federation.client import Turn, client_weights
from cl_bench.models import MLP
from cl_bench.strategies.federated.fot import FOT
from cl_bench.strategies.penalty.ewc import EWC


class Sealed(Mapping):
    """An upload that nobody but the reducer may look into."""

    opened = False

    def __init__(self, inside):
        self.inside = inside

    def _look(self):
        assert Sealed.opened, "somebody looked into a single upload"
        return self.inside

    def __getitem__(self, name):
        return self._look()[name]

    def __iter__(self):
        return iter(self._look())

    def __len__(self):
        return len(self._look())


class Vault(PlainReducer):
    def add(self, client, upload):
        Sealed.opened = True
        super().add(client, upload)
        Sealed.opened = False


@pytest.mark.parametrize("extraction", ["global", "local"])
@pytest.mark.parametrize("make", [FOT, EWC])
def test_the_server_sees_only_sums(monkeypatch, make, extraction):
    """The whole run works with a reducer whose uploads raise on any access."""
    seen = []
    for name in ("client_fit", "client_statistics"):
        original = getattr(site, name)

        def sealed(*args, original=original, **kwargs):
            upload = original(*args, **kwargs)
            seen.append(upload.sums)
            return Upload(Sealed(upload.sums), upload.steps, upload.seconds)

        monkeypatch.setattr(site, name, sealed)
    stream = make_stream(n=65)  # 13 samples a client: no width of the network
    strategy = make(extraction=extraction) if make is FOT else make()
    settings = Federation(clients=5, per_round=3, rounds=2, statistics="sampled")
    list(learn(make_learner(stream), strategy, stream, settings, lambda clients, r: Vault()))
    assert len(seen) > 12
    for sums in seen:
        for value in sums.values():
            assert not {13, 65} & set(value.shape)


def test_what_clients_collect_with_dropout_on_can_be_repeated():
    stream = make_stream(tasks=1)
    clients = split(stream[0], 2)

    def collected(dropout):
        torch.manual_seed(0)
        learner = make_learner(stream, MLP(stream.input_shape, (12, 12), dropout=(0.5, 0.5)))
        strategy, now = FOT(dropout=dropout), client_weights(learner)
        uploads = [
            client_statistics(learner, strategy, now, client, Turn(0, 0, 0, k))
            for k, client in enumerate(clients)
        ]
        return total(uploads).sums

    quiet, dropped, again = collected(False), collected(True), collected(True)
    assert all(torch.equal(dropped[name], value) for name, value in again.items())
    changed = {n for n, value in quiet.items() if not torch.allclose(dropped[n], value)}
    layers = {name.partition("/")[2] for name in changed}
    assert layers == {"heads.0"}  # the one layer with a dropout before its own


@pytest.mark.parametrize("sketch", SKETCHES)
def test_which_client_is_which_does_not_matter(sketch):
    stream = make_stream(tasks=2)
    found = []
    for swap in (False, True):
        torch.manual_seed(0)
        learner, strategy = make_learner(stream), FOT(sketch=sketch)
        clients = split(stream[0], 2)
        now = client_weights(learner)
        uploads = [
            client_statistics(learner, strategy, now, client, Turn(0, 0, 0, k))
            for k, client in enumerate(clients)
        ]
        summed = total(uploads[::-1] if swap else uploads)
        server_end_task(learner, strategy, now, stream[0], summed.sums)
        found.append({name: U @ U.t() for name, U in strategy.basis.items()})
    for name, P in found[0].items():
        torch.testing.assert_close(P, found[1][name], atol=1e-4, rtol=0)


def test_masks_cancel_and_a_single_masked_upload_tells_nothing():
    torch.manual_seed(0)
    uploads = [Upload({"a": torch.randn(4000) / 100, "n": torch.tensor(3.0)}) for _ in range(4)]
    masked = MaskedReducer([2, 5, 7, 9], 32, seed=1)
    for client, upload in zip([2, 5, 7, 9], uploads, strict=True):
        masked.add(client, upload)
    result, expected = masked.result().sums, total(uploads).sums
    torch.testing.assert_close(result["a"], expected["a"], atol=4 * 2**-32 + 1e-8, rtol=0)
    assert float(result["n"]) == 12.0
    one = masked.masked(2, uploads[0])["a"]
    plain = uploads[0].sums["a"]
    correlation = torch.corrcoef(torch.stack([one.double(), plain.double()]))[0, 1]
    assert abs(float(correlation)) < 4 / math.sqrt(4000)
    shares = torch.histc(one.double() / 2.0**63, 8, -1, 1) / 4000
    torch.testing.assert_close(shares, torch.full_like(shares, 1 / 8), atol=0.03, rtol=0)


def test_nothing_is_clipped_in_silence():
    reducer = MaskedReducer([0, 1], 40, seed=0)
    with pytest.raises(UsageError, match=r"fraction_bits=40.*'big'.*lower fraction_bits"):
        reducer.add(0, Upload({"big": torch.tensor([1e7])}))
    with pytest.raises(UsageError, match="nan"):
        reducer.add(0, Upload({"wrong": torch.tensor([float("nan")])}))


def test_a_run_with_masks_equals_one_without():
    stream = make_stream(tasks=2)
    found = []
    for secure in ("none", "masked"):
        learner, strategy = make_learner(stream), FOT()
        settings = Federation(clients=4, per_round=3, rounds=3, secure=secure)
        list(learn(learner, strategy, stream, settings))
        found.append((weights(learner), strategy.basis))
    for name, value in found[0][0].items():
        torch.testing.assert_close(value, found[1][0][name], atol=1e-5, rtol=0)
    for name, U in found[0][1].items():
        V = found[1][1][name]
        torch.testing.assert_close(U @ U.t(), V @ V.t(), atol=1e-4, rtol=0)

"""Training of a super-network: growth, draws, losses, gradients, resuming, and that it pays on real images."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from elastic_models import images, small
from vitrim.elastic.chain import Chain
from vitrim.elastic.piad import Piad, Stratifier, imitation_loss
from vitrim.elastic.sampler import draw
from vitrim.errors import CheckpointError, UnknownNameError, VitrimError

CONFIG = Piad(grow_epochs=3, max_saving=0.6, num_images=8, probe_images=8, width_multiple=4)


def loader():
    return [(images(4, seed=seed), torch.arange(4)) for seed in (1, 2)]


def test_saving_rises_linearly_and_old_entries_stay():
    model = small()
    with Stratifier(model, CONFIG) as stratifier:
        entries = ()
        for epoch in range(5):
            chain = stratifier.start_epoch(epoch, loader())
            saved = 1 - chain.macs_at(-1) / chain.macs
            target = 0.6 * min(epoch + 1, 3) / 3
            assert target <= saved < target + 0.05
            assert chain.entries[: len(entries)] == entries
            entries = chain.entries
        assert stratifier.start_epoch(1, loader()) is chain
    assert type(model.blocks[0].attn).__name__ == "Attention"


def test_sandwich_losses_are_cross_entropy_then_imitation_of_the_full_network():
    model, x, y = small(), images(4), torch.arange(4)
    with Stratifier(model, CONFIG) as stratifier:
        stratifier.start_epoch(0, loader())
        drawn = draw("sandwich", len(stratifier.chain), 0, 7)
        terms = list(stratifier.losses(x, y, step=7))
        assert {term.part: term.network for term in terms} == drawn
        assert list(drawn) == ["full", "smallest", "random"]
        assert torch.equal(terms[0].out, model(x))
        full = model(x)
        assert torch.allclose(terms[0].loss, F.cross_entropy(full, y))
        for term in terms[1:]:
            with stratifier.network(term.network):
                out = model(x)
            expected = (full.softmax(1) * (full.log_softmax(1) - out.log_softmax(1))).sum(1).mean()
            assert torch.allclose(term.loss, expected)
        assert terms[1].loss > 0


@pytest.mark.parametrize("targets", ["classes", "probabilities"])
def test_original_rule_is_soft_target_cross_entropy_of_one_network(targets):
    model, x = small(), images(4)
    y = torch.arange(4) if targets == "classes" else torch.rand(4, 5, dtype=torch.float64).softmax(1)
    config = Piad(rule="original", distill=False, num_images=8, probe_images=8, grow_epochs=2)
    with Stratifier(model, config) as stratifier:
        stratifier.start_epoch(1, loader())
        (term,) = stratifier.losses(x, y, step=3)
        with stratifier.network(term.network):
            assert torch.allclose(term.loss, F.cross_entropy(model(x), y))
        assert term.network < len(stratifier.chain) - 1


def test_external_teacher_teaches_every_network_without_labels():
    model, teacher, x = small(), small(seed=5), images(4)
    with Stratifier(model, CONFIG, teacher=teacher) as stratifier:
        stratifier.start_epoch(0, loader())
        terms = list(stratifier.losses(x, None, step=0))
        assert torch.allclose(terms[0].loss, imitation_loss(model(x), teacher(x), 1.0, False))
        terms[0].loss.backward()
    assert all(p.grad is None for p in teacher.parameters())


def test_headless_network_imitates_features():
    model, teacher = small(num_classes=0), small(seed=5, num_classes=0)
    config = Piad(labels=False, grow_epochs=1, num_images=8, probe_images=8)
    with Stratifier(model, config, teacher=teacher) as stratifier:
        stratifier.start_epoch(0, loader())
        losses = [term.loss for term in stratifier.losses(images(4), None, step=0)]
    assert all(0 < loss < 2 for loss in losses)


def test_gradients_reach_the_leading_part_alone_and_every_parameter_has_one():
    model, x, y = small().train(), images(4), torch.arange(4)
    config = Piad(rule="uniform", distill=False, grow_epochs=1, num_images=8, probe_images=8)
    with Stratifier(model, config) as stratifier:
        stratifier.start_epoch(0, loader())
        smallest = len(stratifier.chain) - 1
        step = next(step for step in range(9999) if draw("uniform", smallest + 1, 0, step) == {"random": smallest})
        (term,) = stratifier.losses(x, y, step)
        term.loss.backward()
        widths = stratifier.chain.widths(smallest)
    assert all(p.grad is not None for p in model.parameters())
    assert 0 in widths.values()
    for index, block in enumerate(model.blocks):
        hidden, dims = widths[f"blocks.{index}.mlp"], widths[f"blocks.{index}.attn"]
        assert not block.mlp.fc1.weight.grad[hidden:].any()
        assert not block.attn.proj.weight.grad.view(48, 3, 16)[:, :, dims:].any()
        assert hidden == 0 or block.mlp.fc1.weight.grad[:hidden].any()


def test_resuming_in_the_middle_of_growth_gives_the_same_numbers():
    def train(epochs: range, model, state=None):
        optimizer, record = torch.optim.SGD(model.parameters(), 0.01), []
        with Stratifier(model, CONFIG) as stratifier:
            if state is not None:
                stratifier.load_state_dict(state)
            for epoch in epochs:
                stratifier.start_epoch(epoch, loader())
                for step, (x, y) in enumerate(loader(), 2 * epoch):
                    optimizer.zero_grad()
                    for term in stratifier.losses(x, y, step):
                        term.loss.backward()
                        record.append((term.network, term.loss.item()))
                    optimizer.step()
            return record, stratifier.state_dict()

    whole = small()
    expected, _ = train(range(4), whole)
    first = small()
    begun, state = train(range(2), first)
    second = small(seed=3)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    rest, _ = train(range(2, 4), second, state)
    assert begun + rest == expected
    with pytest.raises(CheckpointError, match="max_saving"):
        Stratifier(second, Piad(grow_epochs=3, num_images=8, probe_images=8, width_multiple=4)).load_state_dict(state)


def test_states_and_chains_of_something_else_are_refused():
    model, other = small(), Stratifier(small(img_size=96), CONFIG)
    with pytest.raises(CheckpointError, match="another model or input size"):
        Stratifier(model, CONFIG, chain=other.chain)
    with pytest.raises(CheckpointError, match="not a state of a Stratifier"):
        Stratifier(model, CONFIG).load_state_dict({})
    with pytest.raises(CheckpointError, match="another model or input size"):
        Stratifier(model, CONFIG).load_state_dict(other.state_dict())
    assert Stratifier(model, replace(CONFIG, width_multiple=8), chain=Stratifier(model, CONFIG).chain).chain


def test_growth_ends_where_nothing_is_left():
    model = small()
    with Stratifier(model, replace(CONFIG, max_saving=0.99, grow_epochs=6)) as stratifier:
        chain = stratifier.start_epoch(5, loader())
    assert not any(chain.widths(-1).values())


def test_trained_supernet_extracts_what_was_trained():
    model, x = small(), images(4)
    with Stratifier(model, CONFIG) as stratifier:
        stratifier.start_epoch(2, loader())
        index = len(stratifier.chain) // 2
        with stratifier.network(index):
            expected = model(x)
    net = stratifier.finish()
    assert net.compensations is None
    assert torch.allclose(net.cut(index)(x), expected, atol=1e-12)


def test_activation_checkpointing_gives_the_same_gradients():
    grads = []
    for checkpointing in (False, True):
        model = small().train()
        model.set_grad_checkpointing(checkpointing)
        with Stratifier(model, CONFIG) as stratifier:
            stratifier.start_epoch(1, loader())
            for term in stratifier.losses(images(4), torch.arange(4), step=1):
                term.loss.backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(one, two, atol=1e-12) for one, two in zip(*grads, strict=True))


def test_bad_configuration_is_told_in_one_line():
    with pytest.raises(UnknownNameError, match="sandwich"):
        Piad(rule="sandwhich")
    with pytest.raises(VitrimError, match="max_saving"):
        Piad(max_saving=1.0)
    for name in ("grow_epochs", "num_images", "probe_images"):
        with pytest.raises(VitrimError, match=f"{name} is a positive integer, not 0"):
            Piad(**{name: 0})
    with pytest.raises(VitrimError, match="distill=False"):
        Stratifier(small(), Piad(rule="uniform"))
    with Stratifier(small(), CONFIG) as stratifier, pytest.raises(VitrimError, match="teacher"):
        list(stratifier.losses(images(2), None, 0))


def _one_step(rank: int, file: str, out: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    model = small().train()
    share = [(x[rank * 2 : rank * 2 + 2], y[rank * 2 : rank * 2 + 2]) for x, y in loader()]
    with Stratifier(model, CONFIG) as stratifier:
        stratifier.start_epoch(2, share)
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        for term in stratifier.losses(*share[0], step=4, model=wrapped):
            term.loss.backward()
        chain = stratifier.chain.to_json()
    torch.save(([p.grad for p in model.parameters()], chain), f"{out}{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_train_the_same_networks_as_one(tmp_path):
    files = (str(tmp_path / "rendezvous"), str(tmp_path / "rank"))
    torch.multiprocessing.start_processes(_one_step, files, nprocs=2, start_method="forkserver")
    (grads, chain), (_, other) = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert chain == other
    model = small().train()
    with Stratifier(model, CONFIG) as stratifier:
        stratifier.start_epoch(2, loader())
        for term in stratifier.losses(*loader()[0], step=4):
            term.loss.backward()
        widths = [(entry.module, entry.width) for entry in stratifier.chain.entries]
    assert [(entry.module, entry.width) for entry in Chain.from_json(chain).entries] == widths
    for expected, found in zip(model.parameters(), grads, strict=True):
        assert torch.allclose(expected.grad, found, atol=1e-10)

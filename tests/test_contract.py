"""The laws of a reduction, for every reducer and schedule on every model that an adapter covers."""

import copy
import pickle
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from threading import Barrier

import pytest
import torch
from torch import Tensor, nn

import vitrim
from references import REDUCER_REFERENCES, SCORE_REFERENCES, gradients_of_reference, reduced_vit
from vitrim.errors import ScoreError, VitrimError
from vitrim.models import ADAPTERS, Adapter, RemovedBranch, find_adapter, narrow
from vitrim.tokens import REDUCERS, SCHEDULES, SCORES, Reducer, Schedule, render
from zoo import MODELS, ZOO, build, images, predicted

# A reducer or schedule without an entry takes part with its default options.
VARIANTS: dict[str, list[Reducer]] = {
    "TopK": [vitrim.TopK(), vitrim.TopK(fuse="sum"), vitrim.TopK("norm", fuse="mean")],
    "ToMe": [vitrim.ToMe(), vitrim.ToMe(prop_attn=False)],
    "Cluster": [vitrim.Cluster(), vitrim.Cluster("norm", prop_attn=False)],
}
SCHEDULE_OF: dict[str, Schedule] = {
    "PowerLaw": vitrim.PowerLaw(0.6, 1.5),
    "KeepRate": vitrim.KeepRate(0.6, at=(0, 2)),
    "Stages": vitrim.Stages({0: 0.8, 1: 0.5}),
    "ConstantR": vitrim.ConstantR(4),
    "Counts": vitrim.Counts((25, 14, 9)),
    "Budget": vitrim.Budget(0.8),
}


@dataclass(frozen=True)
class Case:
    """A reducer, and the block before which tokens return."""

    reducer: Reducer
    reinstate: int | None = None

    def __str__(self) -> str:
        return render(self.reducer) + ("" if self.reinstate is None else f"-reinstate={self.reinstate}")

    def suited(self, model: nn.Module) -> Reducer:
        """The reducer, with a score that a model without CLS can supply."""
        if self.reducer.needs == "cls_row" and not find_adapter(model).geometry(model).has_cls:
            if not hasattr(self.reducer, "score"):
                pytest.skip("the reducer needs a CLS token")
            return replace(self.reducer, score="mean_attention")
        return self.reducer

    def cuts(self, *at: int, **options: str) -> Schedule:
        """Cuts inside these blocks, of three, as far as they come before the return."""
        early = tuple(block for block in at if self.reinstate is None or block < self.reinstate)
        return vitrim.KeepRate(0.6, at=early, reinstate=self.reinstate, **options)

    def schedules(self, names: Iterable[str] = SCHEDULE_OF) -> Iterator[Schedule]:
        """Every schedule, at both places where it leaves the place open."""
        for schedule in map(SCHEDULE_OF.__getitem__, names):
            for place in ("inside", "before"):
                options = {"place": place, "reinstate": self.reinstate}
                if isinstance(schedule, vitrim.Budget):
                    share = 0.8 if self.reinstate is None else 0.97
                    yield vitrim.Budget(share, shape=vitrim.PowerLaw(1.0, **options))
                elif isinstance(schedule, vitrim.Counts):
                    yield vitrim.Counts(schedule.counts[: self.reinstate], **options)
                elif isinstance(schedule, vitrim.KeepRate):
                    yield self.cuts(*schedule.at, place=place)
                else:
                    yield replace(schedule, **options)


SCHEDULE_OF |= {name: SCHEDULES[name]() for name in SCHEDULES if name not in SCHEDULE_OF}
REDUCTIONS = [reducer for name in REDUCERS for reducer in VARIANTS.get(name, [REDUCERS[name]()])]
RETURNING = [Case(vitrim.TopK(), 2), Case(vitrim.TopK(fuse="sum"), 2), Case(vitrim.ToMe(), 2)]
CASES = [*map(Case, REDUCTIONS), *RETURNING]
# What returns is the same in every family; these differ in prefix tokens, heads, attention and what is left of it.
RETURNED_IN = ("toy", "vit", "deit_distilled", "dinov2_registers", "siglip", "gap", "gated", "removed")
# Every reducer and schedule on one model of each family; models that differ from it in norms, heads or positions meet
# fewer of them.
FIRST = {next(iter(ZOO[adapter])) for adapter in ZOO}
FURTHER = (vitrim.TopK(fuse="sum"), vitrim.TopK("norm", fuse="mean"), vitrim.ToMe(), vitrim.Cluster())
SOME_SCHEDULES = ("KeepRate", "Counts")
# Models of transformers share all but their layers and heads with each other, and their blocks with timm's.
IN_TRANSFORMERS = (vitrim.TopK(), vitrim.TopK(fuse="sum"), vitrim.ToMe())
PAIRS = [
    (*model, case)
    for model in MODELS
    for case in CASES
    if (case.reinstate is None or model[1] in RETURNED_IN)
    and (model[1] in FIRST or model[1] in RETURNED_IN or case.reducer in FURTHER)
    and (model[0] != "transformers" or case.reducer in IN_TRANSFORMERS)
]


def in_turn() -> Iterator[tuple[str, str, Case]]:
    """What holds of a model whatever the reduction is: of the further models each meets one, all of them in turn."""
    for at, model in enumerate(MODELS):
        cases = [case for *other, case in PAIRS if (*other,) == model]
        staying = [case for case in cases if case.reinstate is None]
        for case in cases if model[1] in FIRST else [staying[at % len(staying)], *cases[len(staying) :]]:
            yield (*model, case)


FAMILY = {name: adapter for adapter, name in MODELS}
each_model = pytest.mark.parametrize(("adapter", "name"), MODELS, ids=[name for _, name in MODELS])
each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_pair = pytest.mark.parametrize(("adapter", "name", "case"), PAIRS, ids=str)
each_in_turn = pytest.mark.parametrize(("adapter", "name", "case"), [*in_turn()], ids=str)


def refused(model: nn.Module, reducer: Reducer, schedule: Schedule) -> bool:
    """Whether a cut would use an attention that was removed; then asserts that it is refused."""
    adapter = find_adapter(model)
    attention, _ = adapter.branches_of(model)
    gone = [i for i, block in enumerate(adapter.blocks(model)) if isinstance(getattr(block, attention), RemovedBranch)]
    if not gone:
        return False
    with vitrim.attach(model, vitrim.TopK("norm"), schedule) as handle:
        hit = any(cut.block in gone for cut in handle.plan().cuts)
    if not hit or reducer.needs in ("nothing", "hidden"):
        return False
    with pytest.raises(ScoreError, match="was removed"):
        vitrim.attach(model, reducer, schedule)
    return True


def own(method: object) -> bool:
    """Whether a class or function belongs to the package."""
    return method.__module__.partition(".")[0] == "vitrim"


def test_every_entry_of_every_table_takes_part() -> None:
    assert set(ADAPTERS) == set(ZOO)
    assert set(SCHEDULE_OF) == set(SCHEDULES)
    # Law 10 compares with a slow reference, which every method of the package has.
    assert set(REDUCER_REFERENCES) == {name for name, kind in REDUCERS.items() if own(kind)}
    assert set(SCORE_REFERENCES) == {name for name, score in SCORES.items() if own(score.compute)}
    for adapter, name in MODELS:
        assert find_adapter(build(adapter, name)).name == adapter


@each_in_turn
def test_law_1_nothing_to_drop_is_bit_equal(adapter: str, name: str, case: Case) -> None:
    model, x = build(adapter, name), images()
    dense = predicted(model, x)
    for schedule in (vitrim.KeepRate(1.0), vitrim.PowerLaw(0.0), vitrim.ConstantR(0)):
        with vitrim.attach(model, case.suited(model), replace(schedule, reinstate=case.reinstate)):
            assert torch.equal(predicted(model, x), dense)
            final = [find_adapter(model).features(model, x, ())[0] for _ in range(2)]
            assert torch.equal(*final)


@each_model
def test_law_1_prefix_only_last_block_leaves_logits_alone(adapter: str, name: str) -> None:
    model, x = build(adapter, name).double(), images(dtype=torch.float64)
    if find_adapter(model).geometry(model).head != "prefix":
        with pytest.raises(VitrimError, match="cls_only needs a head that reads only CLS"):
            vitrim.attach(model, None, cls_only=True)
        return
    reduction = "TopK(cls_attention) @ KeepRate(0.6, at=(0, 2))"
    with vitrim.attach(model, reduction):
        reduced = predicted(model, x)
    dense = predicted(model, x)
    with vitrim.attach(model, None, cls_only=True) as handle:
        assert (predicted(model, x) - dense).abs().max() < 1e-12
        assert handle.token_counts[-1] == handle.geometry.num_prefix
    with vitrim.attach(model, reduction, cls_only=True):
        # The cut inside the last block acts on the MLP of patch tokens alone, which nothing reads.
        assert (predicted(model, x) - reduced).abs().max() < 1e-12


def test_law_1_prefix_only_last_block_without_attention_leaves_logits_alone() -> None:
    model, x = build("timm-vit", "uneven").double(), images(dtype=torch.float64)
    narrow(model, {"blocks.2.attn": 0})
    dense = predicted(model, x)
    with vitrim.attach(model, None, cls_only=True) as handle:
        assert (predicted(model, x) - dense).abs().max() < 1e-12
        assert handle.token_counts[-1] == model.num_prefix_tokens


@each_pair
def test_laws_2_3_4_prefix_counts_and_sizes(adapter: str, name: str, case: Case) -> None:
    model, x = build(adapter, name), images()
    before: dict[int, Tensor] = {}
    after: dict[int, Tensor] = {}
    blocks, norm = find_adapter(model).blocks(model), next(iter(find_adapter(model).branches_of(model).values()))
    for index, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda _, args, i=index: before.__setitem__(i, args[0]))
        getattr(block, norm).register_forward_pre_hook(lambda _, args, i=index: after.__setitem__(i, args[0]))
    lengths: list[int] = []
    for block in blocks:
        block.register_forward_hook(lambda _, args, out: lengths.append(out.shape[1]))
    prefix = find_adapter(model).geometry(model).num_prefix
    for schedule in case.schedules(SCHEDULE_OF if name in FIRST else SOME_SCHEDULES):
        if refused(model, case.suited(model), schedule):
            continue
        handle = vitrim.attach(model, case.suited(model), schedule)
        lengths.clear()
        predicted(model, x)
        assert tuple(lengths) == handle.token_counts
        assert len(set(lengths)) > 1, "the schedule must cut something here"
        for cut in handle.plan().cuts:
            if cut.place == "before":
                assert torch.equal(before[cut.block][:, :prefix], after[cut.block][:, :prefix])
                assert after[cut.block].shape[1] == prefix + cut.num_out
        for state, length in zip(handle.states, lengths, strict=True):
            num_slots = length - prefix
            assert state.size.shape == (len(x), num_slots)
            assert state.origin.min() >= -1
            for origin, size in zip(state.origin, state.size, strict=True):
                behind = torch.bincount(origin[origin >= 0], minlength=num_slots)
                assert torch.equal(behind.float(), size), "every slot stands for as many tokens as point at it"
                assert size.min() >= 1
            if case.reducer.merges or case.reducer.extra_tokens:
                assert torch.equal(state.size.sum(1), torch.full((len(x),), float(state.origin.shape[1])))
        assert (handle.states[-1].size.shape[1] == handle.geometry.num_patches) == (case.reinstate is not None)
        handle.remove()


@each_in_turn
def test_laws_5_and_6_remove_deepcopy_pickle(adapter: str, name: str, case: Case) -> None:
    model, x = build(adapter, name), images()
    dense, classes = predicted(model, x), [type(module) for module in model.modules()]
    keys, attributes = list(model.state_dict()), {n: set(vars(m)) for n, m in model.named_modules()}
    handle = vitrim.attach(model, case.suited(model), case.cuts(0, 2))
    reduced = predicted(model, x)
    assert list(model.state_dict()) == keys
    twin, thawed = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    handle.remove()
    handle.remove()
    assert torch.equal(predicted(model, x), dense)
    assert [type(module) for module in model.modules()] == classes
    assert {n: set(vars(m)) for n, m in model.named_modules()} == attributes
    for other in (twin, thawed):
        own = vitrim.attached(other)
        assert own is not None
        assert own.model is other
        assert torch.equal(predicted(other, x), reduced)
        assert len(own.states) == len(handle.token_counts)
        own.remove()
        assert torch.equal(predicted(other, x), dense)


@each_case
@pytest.mark.parametrize(
    ("name", "at"),
    [
        ("vit", (0, 1)),
        ("dinov2_registers", (0, 1)),
        ("siglip", (0, 1)),
        ("removed", (0, 2)),
        ("toy", (0, 1)),
        ("dinov3", (0, 1)),
        ("relpos_cls", (0, 1)),
    ],
)
def test_law_7_gradients_survive_recomputation(name: str, at: tuple[int, ...], case: Case) -> None:
    model, x, other = build(FAMILY[name], name).double(), *(images(dtype=torch.float64, seed=s) for s in (1, 2))

    def gradients() -> list[Tensor]:
        model.zero_grad()
        (
            predicted(model, x).square().sum() + predicted(model, other).sum()
        ).backward()  # Two passes before one backward.
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    with vitrim.attach(model, case.suited(model), case.cuts(*at)) as handle:
        plain = gradients()
        seen = handle.states
        find_adapter(model).recompute(model)
        recomputed = gradients()
        assert all(torch.equal(a.origin, b.origin) for a, b in zip(handle.states, seen, strict=True))
    assert len(plain) == len(recomputed) > 30
    for a, b in zip(plain, recomputed, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)


COMPILED_IN = ("deit_distilled", "gap", "removed", "toy")
# Each of them has reductions that prune, fuse, merge or return.
COMPILED = [(COMPILED_IN[at % 4], case) for at, case in enumerate(CASES)]


@pytest.mark.parametrize(("name", "case"), COMPILED, ids=str)
def test_law_8_full_graph_compile(name: str, case: Case) -> None:
    model, x = build(FAMILY[name], name), images()
    torch._dynamo.reset()
    with vitrim.attach(model, case.suited(model), case.cuts(0, 2)), torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(predicted(compiled, x), predicted(model, x))


def test_law_8_compile_with_inductor() -> None:
    model, x = build("timm-vit", "vit"), images()
    model.blocks = model.blocks[:1]
    torch._dynamo.reset()
    with vitrim.attach(model, vitrim.TopK(fuse="sum"), vitrim.KeepRate(0.6, at=(0,))), torch.no_grad():
        torch.testing.assert_close(
            torch.compile(model, fullgraph=True, backend="inductor")(x), predicted(model, x), rtol=1e-4, atol=1e-4
        )


# What returns was reduced before, so that these hold every step of every reducer; only they become ONNX files.
EXPORTED = [
    *(("vit", case) for case in RETURNING),
    ("gap", Case(vitrim.ToMe(prop_attn=False))),
    ("uneven", Case(vitrim.TopK("random"))),
    ("removed", Case(vitrim.TopK("norm", fuse="mean"))),
    ("toy", Case(vitrim.ToMe())),
    ("dinov3", Case(vitrim.ToMe())),
    *(("vit", Case(reducer)) for name in REDUCERS if name not in VARIANTS for reducer in [REDUCERS[name]()]),
]


# Fusing that returns in one, merging among rotated positions in the other.
AS_ONNX = [("vit", Case(vitrim.TopK(fuse="sum"), 2)), ("dinov3", Case(vitrim.ToMe())), ("vit", Case(vitrim.Cluster()))]


@pytest.mark.parametrize(("name", "case"), EXPORTED, ids=str)
def test_law_8_export_and_onnx_with_another_batch_size(name: str, case: Case, tmp_path: pytest.TempPathFactory) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model, x = build(FAMILY[name], name), images(2)
    if name != "toy":
        model.blocks = model.blocks[: 2 if case.reinstate is None else 3]
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    with vitrim.attach(model, case.suited(model), case.cuts(0, 1)) as handle, torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=(batch,))
        assert handle.policy.last is None, "tensors of the tracer must not stay behind"
        run = [program.module()]
        if (name, case) in AS_ONNX:
            file = str(tmp_path / "model.onnx")
            torch.onnx.export(program, (), file, dynamo=True, verbose=False)
            session = onnxruntime.InferenceSession(file)
            run.append(lambda y: torch.from_numpy(session.run(None, {session.get_inputs()[0].name: y.numpy()})[0]))
        for count in (1, 5):
            y = images(count, seed=count)
            eager = predicted(model, y)
            for each in run:
                torch.testing.assert_close(each(y), eager, rtol=1e-4, atol=1e-4)


@each_in_turn
def test_law_9_an_image_does_not_depend_on_its_batch(adapter: str, name: str, case: Case) -> None:
    model, x = build(adapter, name).double(), images(4, dtype=torch.float64)
    for schedule in (case.cuts(0, 2), replace(SCHEDULE_OF["Stages"], reinstate=case.reinstate)):
        if refused(model, case.suited(model), schedule):
            continue
        with vitrim.attach(model, case.suited(model), schedule) as handle:
            together = predicted(model, x)
            origin = handle.states[-1].origin
            for i in (0, 3):
                assert (predicted(model, x[i : i + 1])[0] - together[i]).abs().max() < 1e-12
                assert torch.equal(handle.states[-1].origin[0], origin[i])


@torch.no_grad()
def agrees_with_reference(model: nn.Module, reducer: Reducer, schedule: Schedule, *, cls_only: bool = False) -> None:
    x = images(2, dtype=torch.float64)
    with vitrim.attach(model, reducer, schedule) as handle:
        plan = handle.plan()
    with vitrim.attach(model, reducer, schedule, cls_only=cls_only) as handle:
        fast = predicted(model, x)
        for image, logits, origin in zip(x, fast, handle.states[-1].origin, strict=True):
            expected, tokens = reduced_vit(model, image, reducer, plan)
            assert (logits - expected).abs().max() < 1e-10
            if not cls_only:
                for slot, members in enumerate(tokens.members):
                    assert set((origin == slot).nonzero().flatten().tolist()) == members
                assert set((origin == -1).nonzero().flatten().tolist()) == tokens.lost


@each_pair
@pytest.mark.parametrize("place", ["inside", "before"])
def test_law_10_equals_slow_reference(adapter: str, name: str, case: Case, place: str) -> None:
    model = build(adapter, name).double()
    agrees_with_reference(model, case.suited(model), case.cuts(0, 2, place=place))


@pytest.mark.parametrize("reducer", [vitrim.TopK(), vitrim.TopK("norm"), vitrim.ToMe()], ids=str)
@pytest.mark.parametrize("place", ["inside", "before"])
def test_law_10_gradients_flow_through_what_returns(place: str, reducer: Reducer) -> None:
    model, x = build("timm-vit", "dinov2_registers").double(), images(2, dtype=torch.float64, seed=5)
    with vitrim.attach(model, reducer, Case(reducer, 2).cuts(0, 1, place=place)) as handle:
        plan = handle.plan()
        predicted(model, x).square().sum().backward()
    fast = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, slow in gradients_of_reference(model, x, reducer, plan).items():
        torch.testing.assert_close(fast[name], slow, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("score", sorted(name for name in SCORES if not SCORES[name].training_only))
@pytest.mark.parametrize("place", ["inside", "before"])
def test_law_10_every_score(score: str, place: str) -> None:
    model = build("timm-vit", "dinov2_registers").double()
    schedule = vitrim.KeepRate(0.6, at=(0, 1), place=place)
    agrees_with_reference(model, vitrim.TopK(score), schedule)
    agrees_with_reference(model, vitrim.TopK(score, normalise=True, momentum=0.7, fuse="mean"), schedule)


@pytest.mark.parametrize(
    "reducer", [vitrim.TopK(shallow=0), vitrim.TopK(shallow=0, fuse="sum"), vitrim.TopK("norm", momentum=0.5)], ids=str
)
def test_law_10_scores_carried_over_depth(reducer: Reducer) -> None:
    agrees_with_reference(build("timm-vit", "deit").double(), reducer, vitrim.ConstantR(5))


@each_case
@pytest.mark.parametrize("name", ["deit_distilled", "dinov2_registers"])
def test_law_10_prefix_only(name: str, case: Case) -> None:
    agrees_with_reference(build("timm-vit", name).double(), case.reducer, case.cuts(0, 1, 2), cls_only=True)


@torch.no_grad()
def in_threads(model: nn.Module, batches: list[Tensor], count: int = 4) -> list[list[Tensor]]:
    """What each of `count` threads that use the model at the same time gives for these batches."""
    start = Barrier(count)

    def run(_: int) -> list[Tensor]:
        start.wait()
        with torch.no_grad():
            return [predicted(model, x) for x in batches]

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def head_or_refusal(port: Adapter, model: nn.Module, tokens: Tensor) -> Tensor | None:
    """Logits, or None where the head refuses because it cannot know how to weigh these tokens."""
    try:
        return port.head(model, tokens)
    except VitrimError as error:
        if "from which forward pass these features come" not in str(error):
            raise
        return None


def unchanged(x: Tensor) -> Tensor:
    return x


def first_image(x: Tensor) -> Tensor:
    return x[:1]


def cast_and_back(x: Tensor) -> Tensor:
    return x.to(torch.float64).to(x.dtype)


@each_in_turn
def test_law_11_passes_share_nothing(adapter: str, name: str, case: Case) -> None:
    model, batches = build(adapter, name), [images(2, seed=seed) for seed in (1, 2)]
    port = find_adapter(model)
    with vitrim.attach(model, case.suited(model), case.cuts(0, 2)), torch.no_grad():
        alone = [predicted(model, x) for x in batches]
        for results in in_threads(model, batches):
            for logits, expected in zip(results, alone, strict=True):
                torch.testing.assert_close(logits, expected)
        features = [port.features(model, x, ())[0] for x in batches]  # One batch, then another, then the heads.
        for change in (unchanged, Tensor.detach, Tensor.clone, cast_and_back, first_image):
            for tokens, expected in zip(features, alone, strict=True):
                logits = head_or_refusal(port, model, change(tokens))
                if logits is None:
                    assert change not in (unchanged, Tensor.detach), "these are the tokens of the pass"
                else:
                    torch.testing.assert_close(logits, expected[: len(logits)])


@each_case
@pytest.mark.parametrize("name", ["gap_with_cls", "dinov2_registers"])
def test_law_11_blocks_of_several_passes_in_turns(name: str, case: Case) -> None:
    model, batches = build("timm-vit", name), [images(2, seed=seed) for seed in (1, 2)]
    with vitrim.attach(model, case.suited(model), case.cuts(0, 1)), torch.no_grad():
        alone = [predicted(model, x) for x in batches]
        tokens = [model.norm_pre(model._pos_embed(model.patch_embed(x))) for x in batches]
        for block in model.blocks:
            tokens = [block(x) for x in tokens]
        for x, expected in zip(tokens, alone, strict=True):
            features = model.norm(x)
            vitrim.models.reduction.trace.mark(features, vitrim.models.trace_of(x))
            torch.testing.assert_close(model.forward_head(features), expected)


@each_case
def test_law_11_threads_where_hooks_make_new_tensors(case: Case) -> None:
    model, batches = build("timm-vit", "gap_with_cls"), [images(2, seed=seed) for seed in range(3)]
    with vitrim.attach(model, case.suited(model), case.cuts(0, 1)), torch.no_grad():
        alone = [predicted(model, x) for x in batches]
        for module in (*model.blocks, model.norm):
            module.register_forward_hook(lambda _, args, out: out.clone())
        for results in in_threads(model, batches):
            for logits, expected in zip(results, alone, strict=True):
                torch.testing.assert_close(logits, expected)

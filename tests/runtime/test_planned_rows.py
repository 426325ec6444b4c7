"""Rows that the host knows: planned there, taken to the device in one copy, to the same result; none is read back."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lemo.runtime.fused.engine as engine_module
from lemo.core.layout import Layout
from lemo.core.plan import LayerPlan, Plan
from lemo.ops import plan_local, plan_rows
from lemo.ops.attend_rows import far
from lemo.ops.attend_rows.cuts import Cut
from lemo.ops.attend_rows.reference import Segments
from lemo.ops.backend import send_all
from lemo.runtime.batch import LOCAL_ROWS, BatchContext, read_layout, supervised_rows
from lemo.runtime.fused.shipment import Shipment
from tests.runtime.oracle import batch, tiny_model
from tests.runtime.test_context_window import _packed
from tests.runtime.test_local_rows import run

BLOCK, LAYERS, WIDTH, TILE = 4, 3, 8, 16
META = torch.device("meta")
KINDS = ("plain", "packed", "padded")
OF_ROW = ("document_of_row_N", "position_of_row_N", "block_of_row_N")


def inputs_of(kind, local):
    """Documents of one or two lengths; every other block of rows with loss is local."""
    inputs = (
        batch(48, supervised_from=28) if kind == "plain" else _packed((28, 20), None if kind == "packed" else "left")[0]
    )
    if local:
        row_T = torch.arange(inputs["labels"].shape[1])
        inputs[LOCAL_ROWS] = supervised_rows(inputs) & (row_T // BLOCK % 2 == 0)
    return inputs


def plan_of(ratios, *, scorer="recent", policy="topk", **choices):
    """Layers alike, with a threshold in the midst of what `recent` gives."""
    layers = (LayerPlan(*ratios, threshold=-3.0 if scorer == "recent" else 0.4),) * LAYERS
    return Plan(layers, block_size=BLOCK, scorer=scorer, policy=policy, **choices)


def calls_of(plan, inputs, device, **options):
    """The selection of every layer, its call where it was planned, and as layers get it, on a device without memory."""
    inputs = dict(inputs)
    host = read_layout(inputs, None, BLOCK, inputs.pop(LOCAL_ROWS, None))
    layout = host if device.type == "cpu" else on_device(host, device)
    context, found = BatchContext(plan, layout, **options), []
    x_BTM = torch.zeros(host.batch, host.tokens, WIDTH, device=device)
    for index in range(LAYERS):
        selection = context.select(index, x_BTM.flatten(0, 1))
        call = engine_module.make_call(context, index, selection, x_BTM, {}, None)
        pairs = [pair for key, pair in context._made.items() if isinstance(key, tuple) and key[0] is selection]
        found.append((selection, next(planned for planned, sent in pairs if sent.queries is call.queries), call))
    return found


def on_device(host, device):
    """The layout of a batch that lies on a device, as `Layout.build` makes it."""
    return replace(host, **{n: getattr(host, n).to(device) for n in OF_ROW}, twin=host)


def same(one, other, device=None):
    """Whether two objects hold the same: values, but on a device without memory sizes and dtypes alone."""
    if isinstance(one, torch.Tensor):
        assert one.shape == other.shape and one.dtype == other.dtype
        assert other.device.type in ("cpu", device.type if device else "cpu")
        return other.is_meta or torch.equal(one, other)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(same(a, b, device) for a, b in zip(one, other, strict=True))
    if is_dataclass(one):
        names = [f.name for f in fields(one) if not f.name.startswith("_") and f.name not in ("planned", "device")]
        return type(one) is type(other) and all(same(getattr(one, n), getattr(other, n), device) for n in names)
    return one == other or type(one) is type(other)


def tensors_of(value, seen):
    """Tensors that a layer's call holds for the device, by where they are."""
    if isinstance(value, torch.Tensor):
        seen.append(value)
    elif isinstance(value, tuple):
        for item in value:
            tensors_of(item, seen)
    elif is_dataclass(value):
        for field in fields(value):
            if field.name not in ("position_on_host_N", "planned", "marks"):
                tensors_of(getattr(value, field.name), seen)
    return seen


cases = given(
    kind=st.sampled_from(KINDS),
    ratios=st.sampled_from([(1.0, 0.5), (0.75, 0.5), (0.75, 0.75)]),
    gradient=st.sampled_from(["rows", "pairs", "keys"]),
    kv=st.sampled_from(["kept", "all"]),
    window=st.sampled_from([None, 8]),
    local=st.booleans(),
    chosen=st.sampled_from([("recent", "topk"), ("recent", "threshold"), ("random", "topk"), ("random", "threshold")]),
    ends=st.booleans(),
)


def case_of(kind, ratios, gradient, kv, window, local, chosen, ends):
    """A plan, inputs and options that fit each other."""
    local = local and window is not None and ratios[1] < ratios[0]
    choices = {"gradient": "keys" if local else gradient, "context_window": window if ratios[1] < ratios[0] else None}
    plan = plan_of(ratios, kv=kv, scorer=chosen[0], policy=chosen[1], **choices)
    return plan, inputs_of(kind, local), {"loss_rows_only": ends}


@settings(max_examples=25, deadline=None)
@cases
def test_a_device_is_asked_for_nothing(**case):
    """One whose values nobody can read gets what the host gets: the same sizes and dtypes, all of it there."""
    plan, inputs, options = case_of(**case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "_has_vendor", lambda x_BTM: True)
        expected, found = (calls_of(plan, inputs, device, **options) for device in (torch.device("cpu"), META))
    for (alone, made, _), (selection, planned, call) in zip(expected, found, strict=True):
        for one, other in ((alone.forward, selection.forward), (alone.backward, selection.backward)):
            assert (one is None) == (other is None)
            assert one is None or (other.rows_N.is_meta and same(replace(one, twin=None), other.on_host))
        assert same(made, planned) and same(planned, replace(call, in_place=False), META)
        assert all(tensor.is_meta for tensor in tensors_of(call, []))
        assert (call.queries is call.keys) == (planned.queries is planned.keys)
        for rows, their in ((planned.queries, call.queries), *_ranges(planned, call)):
            if getattr(rows, "marks", None) is not None:
                steps, theirs = rows.marks.staircase(TILE), their.marks.staircase(TILE)
                assert theirs.forward_2N.is_meta and steps.documents == theirs.documents
        if planned.exact is not None and planned.exact.context is not None:
            assert call.exact.context.local.seen_4N.is_meta
            assert call.exact.context.local.windowed(5).seen_4N.is_meta


def _ranges(planned, call):
    if planned.exact is not None:
        yield planned.exact.range, call.exact.range
    if planned.parted is not None:
        yield planned.parted.far, call.parted.far


@settings(max_examples=25, deadline=None)
@cases
def test_sent_rows_are_those_of_the_host(**case):
    """Bit for bit, each in one piece of memory that all share; what is one object here is one object there."""
    plan, inputs, options = case_of(**case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "_has_vendor", lambda x_BTM: True)
        found = calls_of(plan, inputs, torch.device("cpu"), **options)
    layout = read_layout(inputs, None, BLOCK)
    for _, planned, _ in found:
        sent = Shipment(layout).send(planned)
        assert same(planned, sent)
        before, after = tensors_of(planned, []), tensors_of(sent, [])
        assert [id(t) for t in before] != [id(t) for t in after] or not before
        pairs = {(id(a), id(b)) for a, b in zip(before, after, strict=True)}
        assert len({a for a, _ in pairs}) == len({b for _, b in pairs}) == len(pairs)
        assert (sent.queries is sent.keys) == (planned.queries is planned.keys)
        for rows, their in ((planned.queries, sent.queries), *_ranges(planned, sent)):
            if getattr(rows, "marks", None) is not None:
                assert same(rows.marks.staircase(TILE), their.marks.staircase(TILE))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("local", [False, True])
def test_training_on_sent_rows_changes_nothing(kind, local, monkeypatch):
    """Loss and every gradient, bit for bit."""
    plan = plan_of((1.0, 0.5), gradient="keys", context_window=8)
    model, inputs = tiny_model(num_hidden_layers=LAYERS), inputs_of(kind, local)
    expected, shipments = run(model, plan, dict(inputs), "fused")[:2], []

    def send(context, selection, rows):
        planned = engine_module._shared_call(context, context.layout, selection, rows)
        shipments.append(Shipment(context.layout))
        shipments[-1].know(selection)
        return planned, shipments[-1].send(planned)

    monkeypatch.setattr(engine_module, "_both_calls", send)
    loss, grads, _ = run(model, plan, dict(inputs), "fused")
    assert shipments and torch.equal(loss, expected[0]) and grads.keys() == expected[1].keys()
    assert all(torch.equal(grads[name], expected[1][name]) for name in grads)


def test_far_keys_are_drawn_without_the_device(monkeypatch):
    """Where queries of a stripe begin is known on the host, too, and is the same."""
    monkeypatch.setattr(far, "FAR_STRIPE", BLOCK)
    plan, inputs = plan_of((1.0, 0.5), gradient="keys", far_share=0.4), inputs_of("packed", False)
    here, there = (calls_of(plan, inputs, device) for device in (torch.device("cpu"), META))
    for (_, _, one), (_, _, other) in zip(here, there, strict=True):
        assert other.queries.position_N.is_meta and one.far.read() == other.far.read()
        assert same(one.far.drawn, other.far.drawn)


def test_rows_that_only_a_device_knows_are_planned_there():
    """A selection without rows on the host gives calls of the device, as before."""
    plan = plan_of((1.0, 0.5), gradient="keys")
    host = read_layout(batch(48), None, BLOCK)
    context = BatchContext(plan, on_device(host, META))
    x_BTM = torch.zeros(1, 48, WIDTH, device=META)
    selection = context.select(0, x_BTM[0])
    hidden = replace(selection, backward=replace(selection.backward, twin=None))
    assert selection.on_host is not None and hidden.on_host is None
    call = engine_module.make_call(context, 0, hidden, x_BTM, {}, None)
    assert next(iter(context._made[key] for key in context._made if key[0] is hidden))[0].queries.position_N.is_meta
    assert call.exact.rows_n.is_meta


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 90), min_size=1, max_size=3), seed=st.integers(0, 999), invalid=st.booleans())
def test_first_queries_of_keys(lengths, seed, invalid):
    """The first of a document that sees a key, by its definition; rows that are not valid see all."""
    generator = torch.Generator().manual_seed(seed)
    places = [torch.randperm(n, generator=generator)[: max(1, n // 3)].sort().values for n in lengths]
    counts = tuple(map(len, places))
    q_starts, k_starts = (torch.tensor((0, *n)).cumsum(0)[:-1].tolist() for n in (counts, lengths))
    valid_N = torch.cat([torch.arange(n) < max(1, n - 2) for n in counts]) if invalid else None
    queries = Segments(tuple(q_starts), counts, torch.cat(places), valid_N)
    keys = Segments(tuple(k_starts), tuple(lengths), torch.cat([torch.arange(n) for n in lengths]))
    found = plan_rows(queries, keys, Cut(128, 128, 128, 128)).marks.staircase(TILE).seeing_2K[0]
    for d, length in enumerate(lengths):
        position_n = places[d].clone()
        if valid_N is not None:
            position_n[~valid_N[q_starts[d] : q_starts[d] + counts[d]]] = 10_000
        for at in range(length):
            before = int((position_n < at).sum())
            assert int(found[k_starts[d] + at]) == q_starts[d] + before


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=3), window=st.sampled_from([None, 3, 11]))
def test_places_of_whole_documents_need_no_search(lengths, window):
    """What local rows see is the same as by bisection among the keys."""
    starts = torch.tensor((0, *lengths)).cumsum(0)[:-1].tolist()
    rows = Segments(tuple(starts), tuple(lengths), torch.cat([torch.arange(n) for n in lengths]))
    found, searched = (
        plan_local(rows, rows, chunk=8, sink=4, window=window, whole=whole).seen_4N for whole in (True, False)
    )
    assert found.dtype == searched.dtype and torch.equal(found, searched)


def test_tensors_share_a_copy():
    """Of any dtype and size, also none; each begins where no kernel can tell it from one of its own."""
    tensors = [torch.arange(5), torch.ones(3, dtype=torch.bool), torch.zeros(0), torch.randn(2, 7).T, torch.tensor(3)]
    found = send_all(tensors, torch.device("cpu"))
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, tensors, strict=True))
    assert len({t.untyped_storage().data_ptr() for t in found}) == 1
    assert all(t.storage_offset() * t.itemsize % 256 == 0 and t.is_contiguous() for t in found)
    assert all(t.is_meta for t in send_all(tensors, META)) and send_all([], META) == []


@pytest.mark.parametrize("documents", [[[0] * 12], [[-1, 0, 0, 1, 1, 1, 1, 1, 2, -1, -1, -1]]])
def test_a_layout_keeps_its_rows_on_the_host(documents):
    """On another device, too; budgets and blocks are the same."""
    flags = torch.arange(12)[None] % 5 == 1
    host, far = (Layout.build(torch.tensor(documents), flags, block_size=BLOCK, device=d) for d in ("cpu", "meta"))
    assert host.on_host is host and far.device == META and far.on_host.device.type == "cpu"
    assert all(torch.equal(getattr(host, n), getattr(far.on_host, n)) for n in OF_ROW)
    assert torch.equal(host.forced_K, far.forced_K) and host.real_rows == far.real_rows

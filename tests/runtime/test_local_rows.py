"""Local loss rows: they carry loss and attend locally. Against a dense model with masks of its own, in fp64."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import replace

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface

import lemo.runtime.fused.offload as offload
from lemo.core.plan import LayerPlan, Plan
from lemo.errors import ConfigError
from lemo.ops.attend_rows import far
from lemo.runtime.attach import attach
from lemo.runtime.batch import LOCAL_ROWS, read_layout, supervised_rows
from lemo.runtime.context import loss_rows, part_rows
from lemo.runtime.model import decoder_layers
from lemo.runtime.rows import RowRange, all_rows
from tests.runtime.oracle import FAMILIES, batch, fill_adapters, gradients, relative, tiny_model
from tests.runtime.test_context_window import _packed, windowed
from tests.runtime.test_exact import BOUND, StopGradient, _hook_layer, in_double, near_keys
from tests.runtime.test_fused import FUSED, assert_equal_engines
from tests.runtime.test_laws import assert_same_gradients

ENGINES = ("generic", "fused")
SEEN = ("near", "all")  # what local rows see in forward
BLOCK = 4
# Of twelve blocks of four rows, in chunks of two blocks.
FAR, LOCAL = (6,), (3, 7, 8, 9)
CASES = {
    "some": (FAR, LOCAL),
    "local alone": ((), (5, 8, 9)),
    "guards too": ((), (0, 4, 9, 11)),
    "all the rest": ((2, 6), (0, 1, 3, 4, 5, 7, 8, 9, 10, 11)),
    "all": ((), tuple(range(12))),
}


def marked(far_blocks=FAR, local_blocks=LOCAL, *, tokens=48, rows=1, block=BLOCK):
    """A batch with loss on some blocks of rows, some of them marked as local."""
    inputs = batch(tokens, rows, supervised_from=0)
    block_T = torch.arange(tokens) // block
    wanted = torch.isin(block_T, torch.tensor((*far_blocks, *local_blocks)))
    inputs["labels"][:, 1:].masked_fill_(~wanted[:-1], -100)
    inputs["labels"][:, 0] = -100
    inputs[LOCAL_ROWS] = torch.isin(block_T, torch.tensor(local_blocks)).expand(rows, -1) & supervised_rows(inputs)
    return inputs


def run(model, plan, inputs, engine, **options):
    """Loss and gradients of one step."""
    model.zero_grad(set_to_none=True)
    with attach(model, plan, engine=engine, self_test=False, unsafe_no_bypass=True, **options) as handle:
        loss = model(**inputs).loss
        loss.backward()
    return loss.detach(), gradients(model), handle.selections


@contextmanager
def masked(model, plan, chosen, layout):
    """Inside, the dense model does what the plan promises: far rows see all keys, all others those near them.

    Or local rows, too, see all keys, and take those that are not near them as constants.
    """
    function = StopGradient("keys")
    AttentionInterface.register("localrows", function)
    AttentionMaskInterface.register("localrows", lambda *a, **k: None)
    model.config._attn_implementation_internal = "localrows"
    tokens = layout.tokens
    causal = torch.tril(torch.ones(tokens, tokens, dtype=torch.bool))
    near = near_keys(tokens, plan.context_window, plan.block_size)
    local = layout.local_K[layout.block_of_row_N]
    if plan.local_forward == "all":
        function.passing, local = near | ~local[:, None], torch.zeros_like(local)
    with ExitStack() as stack:
        for index, layer in enumerate(decoder_layers(model)):
            forward, backward = (torch.zeros(tokens, dtype=torch.bool).index_fill(0, r, True) for r in chosen[index])
            seen = causal & (near | (backward & ~local)[:, None])
            _hook_layer(stack, layer, function, seen, forward, backward, plan.layers[index].bypass, plan.kv)
        yield


def error(model, plan, inputs, **options) -> float:
    """Largest relative error of loss and gradients between an executor and the masked model."""
    plain = StopGradient("none")  # eager attention would round to fp32
    plain.inside = torch.ones(48, dtype=torch.bool)
    plain.seen = torch.tril(torch.ones(48, 48, dtype=torch.bool))
    AttentionInterface.register("dense64", plain)
    AttentionMaskInterface.register("dense64", lambda *a, **k: None)
    model.config._attn_implementation_internal = "dense64"
    loss, got, selections = run(model, plan, inputs, loss="model", **options)
    everything = torch.arange(48)
    chosen = {
        i: tuple(everything if r is None else r.chosen() for r in (s.forward, s.backward))
        for i, s in selections.items()
    }
    unmarked = {name: value for name, value in inputs.items() if name != LOCAL_ROWS}
    layout = read_layout(unmarked, None, plan.block_size, inputs[LOCAL_ROWS])
    model.zero_grad(set_to_none=True)
    with masked(model, plan, chosen, layout):
        wanted_loss = model(**unmarked).loss
        wanted_loss.backward()
    wanted = gradients(model)
    scale = torch.stack([g.norm() for g in wanted.values()]).norm()
    return max(relative(loss, wanted_loss), *(float((got[n] - wanted[n]).norm() / scale) for n in wanted))


@pytest.mark.parametrize("seen", SEEN)
@pytest.mark.parametrize("forward", [1.0, 0.75])
@pytest.mark.parametrize("kv", ["kept", "all"])
@pytest.mark.parametrize(
    ("family", "engine"),
    [
        ("llama", "generic"),
        ("llama", "fused"),
        ("llama with as many key heads", "fused"),
        ("qwen3", "fused"),
        ("gpt2", "generic"),
    ],
)
def test_local_rows_attend_as_the_mask_says(family, kv, forward, seen, engine, monkeypatch):
    """Loss and every gradient; marks matter."""
    in_double(monkeypatch)
    family, *many = family.split(" with ")
    model, inputs = tiny_model(family, dtype=torch.float64, **({"num_key_value_heads": 4} if many else {})), marked()
    heads = model.config.num_attention_heads
    assert not many or getattr(model.config, "num_key_value_heads", heads) == heads
    plan = windowed(model, forward, "keys", kv, local_forward=seen)
    plan = replace(plan, layers=tuple(replace(x, backward_ratio=0.6) for x in plan.layers))
    assert error(model, plan, inputs, engine=engine) <= BOUND
    unmarked = {name: value for name, value in inputs.items() if name != LOCAL_ROWS}
    runs = [run(model, plan, x, engine) for x in (inputs, unmarked)]
    assert (abs(float(runs[0][0] - runs[1][0])) > 1e-6) == (seen == "near")
    assert max(float((g - runs[1][1][name]).norm()) for name, g in runs[0][1].items()) > 1e-6


@pytest.mark.parametrize("seen", SEEN)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("engine", ENGINES)
def test_sets_of_rows(engine, case, seen, monkeypatch):
    """No far loss row, no far row at all, no row without loss: what is left is what the mask says."""
    in_double(monkeypatch)
    model = tiny_model(dtype=torch.float64)
    inputs, plan = marked(*CASES[case]), windowed(model, local_forward=seen)
    assert error(model, plan, inputs, engine=engine) <= BOUND
    rows = {"guards too": 16, "all": 48, "all the rest": 48}
    if case in rows:
        selections = run(model, plan, inputs, engine)[2]
        assert all(s.backward.capacity == rows[case] for s in selections.values())


@pytest.mark.parametrize("seen", SEEN)
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("llama", "gpt2")])
def test_every_family_obeys(family, seen, monkeypatch):
    """Sliding windows, soft caps, sinks: a layer's own rule and this one."""
    in_double(monkeypatch)
    model = tiny_model(family, dtype=torch.float64)
    plans = windowed(model, local_forward=seen), windowed(model, kv="kept", local_forward=seen)
    assert error(model, plans[0], marked(), engine="generic") <= BOUND
    if family in FUSED:
        assert error(model, plans[1], marked(*CASES["guards too"]), engine="fused") <= BOUND


@pytest.mark.parametrize("seen", SEEN)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("recompute", ["none", "mlp", "lin", "layer"])
def test_what_is_computed_again_is_what_forward_had(recompute, case, seen, monkeypatch):
    """Every level, the segmented loss reading loss rows alone behind the last layer, with a dense layer in between."""
    in_double(monkeypatch)
    model = tiny_model(dtype=torch.float64)
    plan = windowed(model, 0.75 if recompute in ("none", "lin") else 1.0, local_forward=seen)
    plan = plan.replace_layer(1, forward_ratio=1.0, backward_ratio=1.0)
    assert_equal_engines(model, plan, marked(*CASES[case]), recompute=recompute)


@pytest.mark.parametrize("targets", [["k_proj"], ["v_proj"], ["k_proj", "v_proj", "gate_proj"]])
@pytest.mark.parametrize("seen", SEEN)
def test_adapters_of_keys_and_values(seen, targets, monkeypatch):
    """LoRA, everything else frozen: the loss is a function of it through keys and values of every kind of row."""
    from peft import LoraConfig, get_peft_model

    in_double(monkeypatch)
    model = get_peft_model(tiny_model(dtype=torch.float64), LoraConfig(r=3, target_modules=targets, lora_alpha=7))
    fill_adapters(model)
    for recompute in ("none", "layer"):
        assert_equal_engines(model, windowed(model, local_forward=seen), marked(), recompute=recompute)


@pytest.mark.parametrize("seen", SEEN)
@pytest.mark.parametrize("kv", ["kept", "all"])
def test_rows_that_a_threshold_drops_have_no_effect(kv, seen, monkeypatch):
    in_double(monkeypatch)
    model = tiny_model(dtype=torch.float64)
    plan = windowed(model, 0.75, "keys", kv, local_forward=seen)
    layers = tuple(replace(x, threshold=0.5, backward_ratio=0.7) for x in plan.layers)
    plan = replace(plan, policy="threshold", layers=layers)
    for engine in ENGINES:
        assert error(model, plan, marked(), engine=engine) <= BOUND


@pytest.mark.parametrize("seen", SEEN)
@pytest.mark.parametrize("case", ["some", "local alone", "guards too"])
def test_far_rows_may_read_a_sample_of_far_keys(case, seen, monkeypatch):
    """The sample is of far rows' keys alone; both engines draw alike."""
    in_double(monkeypatch)
    monkeypatch.setattr(far, "FAR_STRIPE", 8)
    model = tiny_model(dtype=torch.float64)
    plan = windowed(model, far_share=0.25, local_forward=seen)
    inputs = marked(*CASES[case])
    assert_equal_engines(model, plan, inputs)
    exact = run(model, replace(plan, far_share=1.0), inputs, "fused")[1]
    moved = [float((g - exact[n]).norm()) for n, g in run(model, plan, inputs, "fused")[1].items()]
    assert (max(moved) > 1e-8) == (case == "some")  # elsewhere nothing that is far reaches the loss


@pytest.mark.parametrize("seen", SEEN)
@pytest.mark.parametrize("offloads", [True, "keys"])
@pytest.mark.parametrize("recompute", ["none", "mlp", "lin", "layer"])
def test_offload_changes_no_bit(recompute, offloads, seen, monkeypatch):
    monkeypatch.setattr(offload, "CHUNK_BYTES", 1000)
    model = tiny_model()
    plan, inputs = windowed(model, local_forward=seen), marked()
    loss, wanted, _ = run(model, plan, inputs, "fused", recompute=recompute)
    got_loss, got, _ = run(model, plan, inputs, "fused", recompute=recompute, offload=offloads)
    assert torch.equal(loss, got_loss) and all(torch.equal(got[name], g) for name, g in wanted.items())


@pytest.mark.parametrize("seen", SEEN)
def test_checkpoints_part_rows_alike(seen, monkeypatch):
    in_double(monkeypatch)
    model = tiny_model(dtype=torch.float64)
    plan, inputs = windowed(model, local_forward=seen), marked()
    wanted = run(model, plan, inputs, "generic")[1]
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_same_gradients(run(model, plan, inputs, "generic")[1], wanted, BOUND)


def _several(lengths, padding):
    """Packed or padded documents with local rows, and each alone."""
    inputs, alone = _packed(lengths, padding)
    inputs[LOCAL_ROWS] = torch.zeros_like(inputs["labels"], dtype=torch.bool)
    for number, (length, one) in enumerate(zip(lengths, alone, strict=True)):
        # Loss is on the rows from length - 9 to length - 2: the first block that holds it whole is local.
        first = -(-(length - 9) // BLOCK) * BLOCK
        one[LOCAL_ROWS] = torch.zeros_like(one["labels"], dtype=torch.bool)
        one[LOCAL_ROWS][:, first : first + BLOCK] = True
        row = 0 if padding is None else number
        start = {None: sum(lengths[:number]), "right": 0, "left": max(lengths) - length}[padding]
        inputs[LOCAL_ROWS][row, start + first : start + first + BLOCK] = True
    return inputs, alone


@pytest.mark.parametrize("seen", SEEN)
@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("forward", [1.0, 0.75])
@pytest.mark.parametrize("engine", ENGINES)
def test_documents_run_as_they_do_alone(engine, forward, padding, seen, monkeypatch):
    """Packed or padded, one of them too short for anything to be far: loss and gradients of each alone."""
    in_double(monkeypatch)
    model = tiny_model(dtype=torch.float64)
    plan, lengths = windowed(model, forward, scorer="random", local_forward=seen), (43, 15, 60)
    inputs, alone = _several(lengths, padding)
    loss, found, _ = run(model, plan, inputs, engine)
    runs = [run(model, plan, one, engine) for one in alone]
    assert abs(float(loss - sum(x[0] for x in runs) / len(runs))) < 1e-10
    assert_same_gradients(found, {name: sum(x[1][name] for x in runs) / len(runs) for name in found}, BOUND)


@pytest.mark.parametrize("seen", SEEN)
@pytest.mark.parametrize("engine", ENGINES)
def test_one_document_cannot_change_another(engine, seen, monkeypatch):
    in_double(monkeypatch)
    model = tiny_model(dtype=torch.float64)
    inputs, _ = _several((40, 45), None)
    inputs["labels"][:, :41] = -100
    plan = windowed(model, local_forward=seen)
    loss = run(model, plan, inputs, engine)[0]
    inputs["input_ids"][:, :40] = inputs["input_ids"][:, :40].flip(1)
    assert abs(float(run(model, plan, inputs, engine)[0] - loss)) < 1e-12


@pytest.mark.parametrize("engine", ENGINES)
def test_local_rows_that_see_all_lose_no_more_than_far_ones(engine, monkeypatch):
    """The loss is that of the same rows without marks; only gradients know which keys were near."""
    in_double(monkeypatch)
    model = tiny_model(dtype=torch.float64)
    plan = windowed(model, local_forward="all")
    inputs = marked()
    unmarked = {name: value for name, value in inputs.items() if name != LOCAL_ROWS}
    losses, found, _ = zip(*(run(model, plan, x, engine) for x in (inputs, unmarked)), strict=True)
    assert abs(float(losses[0] - losses[1])) < 1e-12
    assert all(float((g - found[1][n]).norm()) > 1e-6 for n, g in found[0].items() if "k_proj" in n)


@pytest.mark.parametrize("seen", SEEN)
@pytest.mark.parametrize("window", [8, 24])
@pytest.mark.parametrize("engine", ENGINES)
def test_marks_of_nothing_change_no_bit(engine, window, seen):
    """No row is marked; or rows are of blocks that are not marked whole; or two windows hold the document."""
    model = tiny_model()
    plan, inputs = windowed(model, window=window, local_forward=seen), marked()
    unmarked = {name: value for name, value in inputs.items() if name != LOCAL_ROWS}
    wanted_loss, wanted, _ = run(model, replace(plan, local_forward="near"), unmarked, engine)
    nothing, parts = torch.zeros_like(inputs[LOCAL_ROWS]), inputs[LOCAL_ROWS].clone()
    parts[:, BLOCK - 1 :: BLOCK] = False
    for marks in (nothing, parts, *([inputs[LOCAL_ROWS]] if window == 24 else [])):
        loss, found, _ = run(model, plan, unmarked | {LOCAL_ROWS: marks}, engine)
        assert torch.equal(loss, wanted_loss)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_blocks_are_local_where_all_their_loss_rows_are():
    inputs = marked((2,), (5,))
    inputs["labels"][:, 22:25] = -100  # rows 21..23 of block 5 lose their loss, and stay marked or not
    marks = inputs[LOCAL_ROWS].clone()
    marks[:, 8] = True  # one row of a far block
    marks[:, 40] = True  # a row without loss
    for these in (marks, marks.logical_and(supervised_rows(inputs))):
        layout = read_layout(inputs, None, BLOCK, these)
        assert layout.local_K.nonzero().flatten().tolist() == [5]
        assert layout.supervised_K.nonzero().flatten().tolist() == [2, 5]
        assert layout.rows_of(layout.local_K).tolist() == [20, 21, 22, 23]


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("loss_only", [False, True])
def test_rows_are_parted_by_what_they_attend_to(loss_only, padding):
    """Places, positions and documents of both parts; the host knows the positions where all rows are keys."""
    inputs, _ = _several((43, 15, 60), padding)
    plan = Plan((LayerPlan(1.0, 0.25),), block_size=BLOCK, gradient="keys", context_window=8)
    layout = read_layout(inputs, None, BLOCK, inputs[LOCAL_ROWS])
    rows, keys = loss_rows(layout) if loss_only else all_rows(layout), RowRange.of_batch(layout)
    parted = part_rows(plan, layout, rows, keys)
    both = torch.cat([parted.near_n, parted.far_n])
    assert torch.equal(both.sort().values, torch.arange(rows.capacity)) and len(parted.near_n) == 3 * BLOCK
    local_N = layout.local_K[layout.block_of_row_N]
    for places, side in ((parted.near_n, parted.local.queries), (parted.far_n, parted.far)):
        flat = rows.rows_N[places]
        assert torch.equal(local_N[flat], torch.full((len(flat),), side is parted.local.queries))
        assert torch.equal(layout.position_of_row_N[flat], side.position_N)
        lengths = torch.bincount(layout.document_of_row_N[flat], minlength=3).tolist()
        assert list(side.lengths) == lengths and list(side.starts) == [0, lengths[0], sum(lengths[:2])]
    assert torch.equal(parted.local.position_on_host_N, parted.local.queries.position_N)
    some = RowRange.of_rows(layout, replace(rows, rows_N=rows.rows_N[:9], segment_lengths=(9, 0, 0)))
    assert part_rows(plan, layout, rows, some).local.position_on_host_N is None
    far_first = parted.far_first(rows).rows_N
    wide = part_rows(replace(plan, local_forward="all"), layout, rows, keys).wide(far_first)
    assert len(wide) == 2 and [len(x.queries.position_N) for x in parted.wide(far_first)] == [len(parted.far_n)]
    assert all(torch.equal(layout.position_of_row_N[x.places_n], x.queries.position_N) for x in wide)


def test_evaluation_looks_at_no_marks():
    """Dense evaluation, and the model's own forward never sees the keyword."""
    model, inputs = tiny_model(), marked()
    unmarked = {name: value for name, value in inputs.items() if name != LOCAL_ROWS}
    wanted, seen = model.eval()(**unmarked).loss, []
    hook = decoder_layers(model)[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(set(kwargs)), with_kwargs=True
    )
    with attach(model, windowed(model), self_test=False, unsafe_no_bypass=True):
        assert torch.equal(model.eval()(**inputs).loss, wanted)
        model.train()(**inputs).loss.backward()
    hook.remove()
    assert len(seen) >= 2 and not any(LOCAL_ROWS in names for names in seen)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"context_window": None}, "context_window"),
        ({"gradient": "rows"}, "gradient 'keys'"),
        ({"gradient": "pairs"}, "gradient 'keys'"),
        ({"layers": "equal"}, "exact forward"),
        ({"layers": "dense"}, "exact forward"),
    ],
)
def test_plans_that_know_no_local_rows_are_refused(changes, words):
    model = tiny_model()
    plan = windowed(model)
    if "layers" in changes:
        ratio = 1.0 if changes["layers"] == "dense" else 0.5
        changes = {"layers": tuple(replace(x, forward_ratio=ratio, backward_ratio=ratio) for x in plan.layers)}
    plan = replace(plan, **changes)
    with attach(model, plan, self_test=False, unsafe_no_bypass=True), pytest.raises(ConfigError, match=words):
        model(**marked())


def test_marks_of_another_shape_are_refused():
    model = tiny_model()
    inputs = marked()
    inputs[LOCAL_ROWS] = inputs[LOCAL_ROWS][:, 1:]
    attached = attach(model, windowed(model), self_test=False, unsafe_no_bypass=True)
    with attached, pytest.raises(ConfigError, match="local_rows must be"):
        model(**inputs)

"""Traps of Transformers' attention and masks, each shown not to catch lemo."""

from __future__ import annotations

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import masking_utils

from lemo.errors import LabelsError, UnsupportedModelError
from lemo.runtime import attach as attach_module
from lemo.runtime.attach import attach
from lemo.runtime.batch import read_layout
from lemo.runtime.model import decoder_layers
from tests.integration.plans import BLOCK, documents, exact, keep_all, padded, skipping
from tests.runtime.oracle import batch, gradients, masked_oracle, relative, tiny_model

PLANS = {
    "skip": skipping,
    "skip_kept": lambda m: skipping(m, kv="kept"),
    "rows": exact,
    "pairs": lambda m: exact(m, gradient="pairs"),
}


def run(model, inputs):
    """Loss and gradients."""
    model.zero_grad(set_to_none=True)
    loss = model(**inputs).loss
    loss.backward()
    found = gradients(model)
    model.zero_grad(set_to_none=True)
    return loss.detach(), found


def assert_same(got, wanted, bound=1e-5):
    assert relative(got[0], wanted[0]) <= bound
    assert got[1].keys() == wanted[1].keys()
    scale = torch.stack([g.norm() for g in wanted[1].values()]).norm()
    for name, gradient in wanted[1].items():
        assert (got[1][name] - gradient).norm() <= bound * scale, name


def packed(lengths=(24, 40, 32), *, answer=8, keys="position_ids"):
    """One sequence of documents, told apart as `keys` says; no mask."""
    samples = documents(len(lengths), seed=9)
    for sample, length in zip(samples, lengths, strict=True):
        sample["input_ids"] = (sample["input_ids"] * 2)[:length]
        sample["labels"] = [-100] * (length - answer) + sample["input_ids"][-answer:]
    inputs = {n: torch.cat([torch.tensor(s[n]) for s in samples])[None] for n in ("input_ids", "labels")}
    inputs["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None]
    if keys == "seq_idx":
        inputs["seq_idx"] = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    return inputs


# Positions with gaps


@pytest.mark.parametrize("plan", ["skip", "skip_kept", "rows"])
def test_gaps_between_kept_rows_are_no_document_boundaries(plan):
    """A dropped block leaves a gap in the positions that a layer gets: one document stays one document."""
    model, inputs = tiny_model(), batch(64, supervised_from=56)
    inputs["position_ids"] = torch.arange(64)[None]
    with attach(model, PLANS[plan](model), self_test=False) as handle:
        got = run(model, inputs)
        rows = {i: s.backward.chosen() for i, s in handle.selections.items()}
    assert all((r.diff() > 1).any() for r in rows.values())
    without = {name: value for name, value in inputs.items() if name != "position_ids"}
    with attach(model, PLANS[plan](model), self_test=False):
        assert_same(got, run(model, without), 0.0)


def test_dropping_the_first_block_of_a_document_merges_no_documents():
    """Boundaries come from the batch, not from `position == 0` among kept rows: the guard is not what saves them."""
    model, inputs = tiny_model(), packed()
    plan = skipping(model, kv="kept")
    layout = read_layout(inputs, None, BLOCK)
    assert layout.document_length_D.tolist() == [24, 40, 32]
    inputs_with_ids = packed(keys="seq_idx")
    with attach(model, plan, self_test=False) as handle:
        got = run(model, inputs)
        rows = {i: s.forward.chosen() for i, s in handle.selections.items()}
        assert_same(run(model, inputs_with_ids), got, 0.0)
    model.set_attn_implementation("eager")
    with masked_oracle(model, plan, rows, layout):
        assert_same(got, run(model, inputs))


@pytest.mark.parametrize("family", ["gemma3_text", "olmo3"])
@pytest.mark.parametrize("kv", ["kept", "all"])
def test_windows_count_original_positions(family, kv):
    """A window of 16 sees 16 positions of the document, however few of them take part; packed too."""
    model = tiny_model(family, sliding_window=16)
    plan = skipping(model, 0.5, kv=kv)
    for inputs in (batch(64, 2, supervised_from=56), packed()):
        with attach(model, plan) as handle:
            got = run(model, inputs)
            rows = {i: s.forward.chosen() for i, s in handle.selections.items()}
        compact = run_with_compact_window(model, plan, inputs)
        model.set_attn_implementation("eager")
        with masked_oracle(model, plan, rows, read_layout(inputs, None, BLOCK)):
            wanted = run(model, inputs)
        model.set_attn_implementation("sdpa")
        assert_same(got, wanted)
        assert relative(compact, wanted[0]) > 1e-3, "the test cannot tell the two windows apart"


def run_with_compact_window(model, plan, inputs):
    """The loss if windows did not count, as on so few compact rows: keys come into view that lie too far back."""
    windows = {}
    for index, layer in enumerate(decoder_layers(model)):
        for module in layer.children():
            if getattr(module, "sliding_window", None) is not None:
                windows[index], module.sliding_window = module.sliding_window, 64
    assert windows
    with attach(model, plan, self_test=False):
        loss = run(model, inputs)[0]
    for index, layer in enumerate(decoder_layers(model)):
        for module in layer.children():
            if getattr(module, "sliding_window", None) is not None:
                module.sliding_window = windows[index]
    return loss


# In-place writes


@pytest.mark.parametrize("plan", PLANS)
def test_writing_on_peft_leaf_copies_once(plan):
    """The embedding output that PEFT made a leaf stays what it was, and gets a gradient as if written elsewhere."""
    model = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.enable_input_require_grads()
    leaves = []
    seen = model.get_input_embeddings().register_forward_hook(lambda m, a, out: leaves.append((out, out.clone())))
    results = []
    with attach(model, PLANS[plan](model), self_test=False) as handle:
        for in_place in (True, False):
            handle.in_place = in_place
            results.append(run(model, batch(supervised_from=56)))
            leaf, before = leaves.pop()
            assert leaf.is_leaf
            assert leaf.requires_grad
            assert torch.equal(leaf, before)
            results[-1][1]["leaf"] = leaf.grad.clone()
    seen.remove()
    assert_same(results[0], results[1], 0.0)


def test_only_the_first_sparse_layer_copies(monkeypatch):
    """In a LoRA run with a leaf at the bottom, every layer above the first writes into the stream it was given."""
    model = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=["q_proj"]))
    model.enable_input_require_grads()
    copied = []
    layers = decoder_layers(model)
    with attach(model, skipping(model), self_test=False):
        for layer in layers:
            call = type(layer).__call__

            def watched(self, x, *args, _call=call, **kwargs):
                address = x.data_ptr()
                out = _call(self, x, *args, **kwargs)
                copied.append(out.data_ptr() != address)
                return out

            monkeypatch.setattr(type(layer), "__call__", watched)
            break  # one class serves all layers
        model(**batch(supervised_from=56)).loss.backward()
    assert copied == [True, False, False, False]


# Forwards that must stay dense


@pytest.mark.parametrize("how", ["output_hidden_states", "output_attentions", "config", "use_cache"])
def test_forwards_that_want_every_row_run_densely_and_say_so(how):
    model, inputs = tiny_model(), batch()
    if how == "output_attentions":
        model.set_attn_implementation("eager")
    wants = {how: True} if how != "config" else {}
    if how == "config":
        model.config.output_hidden_states = True
    wanted = model(**inputs, **wants)
    with attach(model, skipping(model), loss="model", self_test=False) as handle:
        got = model(**inputs, **wants)
        assert handle.dense_batches == 1
        assert handle.sparse_batches == 0
        assert len(handle.notes) == 1
        model(**inputs, **wants)
        assert len(handle.notes) == 1
    assert torch.equal(got.loss, wanted.loss)
    assert torch.equal(got.logits, wanted.logits)
    for a, b in zip(got.hidden_states or (), wanted.hidden_states or (), strict=True):
        assert torch.equal(a, b)


def test_segmented_loss_keeps_hidden_states_that_were_asked_for():
    """A caller that asks for hidden states gets them with the default loss as well."""
    model, inputs = tiny_model(), batch()
    wanted = model(**inputs, output_hidden_states=True)
    with attach(model, keep_all(model), self_test=False):
        got = model(**inputs, output_hidden_states=True)
    assert got.hidden_states is not None
    assert all(torch.equal(a, b) for a, b in zip(got.hidden_states, wanted.hidden_states, strict=True))


@pytest.mark.parametrize("training", [False, True])
def test_generate_equals_the_plain_model(training):
    """Greedy generation with a cache, in both modes, from left-padded prompts."""
    model = tiny_model().train(training)
    prompts = padded(documents(3), side="left")
    prompts.pop("labels")
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(**prompts, **settings)
    with attach(model, skipping(model), self_test=False) as handle:
        assert torch.equal(model.generate(**prompts, **settings), wanted)
        assert torch.equal(model.generate(**prompts, **settings, use_cache=False), wanted)
        assert not handle.selections


def test_generate_under_sparse_evaluation_is_refused():
    model = tiny_model().eval()
    prompts = padded(documents(2), side="left")
    prompts.pop("labels")
    with (
        attach(model, skipping(model), sparse_eval=True, self_test=False),
        pytest.raises(UnsupportedModelError, match="generation"),
    ):
        model.generate(**prompts, max_new_tokens=2)


def test_generate_without_cache_under_sparse_evaluation_is_refused():
    """A token drawn from rows that were chosen by looking at the whole prompt is generation all the same."""
    model = tiny_model().eval()
    prompts = padded(documents(2), side="left")
    prompts.pop("labels")
    with (
        attach(model, skipping(model), sparse_eval=True, self_test=False),
        pytest.raises((UnsupportedModelError, LabelsError)),
    ):
        model.generate(**prompts, max_new_tokens=2, use_cache=False)


# Masks


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "opt", "gpt_neox"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_stays_hidden_from_an_attached_model_in_evaluation(family, side):
    """The attention name of lemo hides no mask: padded evaluation is the unattached model's, bit for bit."""
    model = tiny_model(family).eval()
    inputs = padded(documents(4), side=side)
    unmasked = {name: value for name, value in inputs.items() if name != "attention_mask"}
    with torch.no_grad():
        wanted = model(**inputs)
        assert not torch.equal(model(**unmasked).logits, wanted.logits)
        with attach(model, skipping(model), self_test=False):
            got = model(**inputs)
    assert torch.equal(got.loss, wanted.loss)
    assert torch.equal(got.logits, wanted.logits)


def count_masks(monkeypatch) -> list[int]:
    """Lengths of the (T, T) masks that Transformers builds from now on."""
    built = []
    for name in ("sdpa_mask", "eager_mask"):
        original = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS[name.removesuffix("_mask")]

        def counted(*args, _original=original, **kwargs):
            mask = _original(*args, **kwargs)
            if mask is not None:
                built.append(mask.shape[-1])
            return mask

        monkeypatch.setitem(masking_utils.ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, name[:-5], counted)
    return built


LONG = [("llama", "pairs")]  # which is refused for windows and soft caps
LONG += [(family, plan) for family in ("llama", "gemma2", "gemma3_text", "olmo3") for plan in list(PLANS)[:3]]


@pytest.mark.parametrize(("family", "plan"), LONG)
def test_long_packed_batches_build_no_square_mask(monkeypatch, family, plan):
    """Past the limit no (T, T) mask exists, some layers are dense, and the result is that of the usual path."""
    model, inputs = tiny_model(family), packed()
    chosen = PLANS[plan](model).replace_layer(1, forward_ratio=1.0, backward_ratio=1.0)
    built = count_masks(monkeypatch)
    with attach(model, chosen, self_test=False) as handle:
        wanted = run(model, inputs)
        assert built, "the usual path builds masks, or this test shows nothing"
        built.clear()
        monkeypatch.setattr(attach_module, "MASK_LIMIT_TOKENS", 64)
        got = run(model, inputs)
        assert not built
        assert handle.sparse_batches == 2
        assert model.config._attn_implementation != "lemo"
    assert_same(got, wanted)


@pytest.mark.parametrize("side", ["left", "right"])
def test_long_padded_batches_build_no_square_mask(monkeypatch, side):
    model, inputs = tiny_model(), padded(documents(3), side=side)
    built = count_masks(monkeypatch)
    with attach(model, skipping(model), self_test=False):
        wanted = run(model, inputs)
        assert built
        built.clear()
        monkeypatch.setattr(attach_module, "MASK_LIMIT_TOKENS", 32)
        got = run(model, inputs)
        assert not built
    assert_same(got, wanted)


def test_the_models_mask_comes_back_after_an_error(monkeypatch):
    """A forward that fails half-way leaves neither a batch nor lemo's attention name behind."""
    model, inputs = tiny_model(), packed()
    monkeypatch.setattr(attach_module, "MASK_LIMIT_TOKENS", 32)
    with attach(model, skipping(model), self_test=False) as handle:
        stop = model.model.norm.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**inputs)
        stop.remove()
        assert handle.context is None
        assert model.config._attn_implementation == "sdpa"
        run(model, inputs)


# Labels that reach the model in other ways


def test_positional_and_shifted_labels_are_read():
    """`shift_labels` instead of labels, and inputs given by position."""
    model, inputs = tiny_model(), batch(supervised_from=56)
    shifted = F.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
    with attach(model, skipping(model), self_test=False) as handle:
        wanted = run(model, inputs)
        rows = [s.forward.chosen() for s in handle.selections.values()]
        model(inputs["input_ids"], labels=inputs["labels"]).loss.backward()
        assert all(torch.equal(a, s.forward.chosen()) for a, s in zip(rows, handle.selections.values(), strict=True))
        got = run(model, {"input_ids": inputs["input_ids"], "shift_labels": shifted})
        assert_same(got, wanted, 1e-6)


def test_training_without_labels_names_the_way_out():
    model, inputs = tiny_model(), batch()
    inputs.pop("labels")
    with (
        attach(model, skipping(model), self_test=False),
        pytest.raises(LabelsError, match=r"handle\.supervised"),
    ):
        model(**inputs)


def test_the_installed_transformers_is_one_that_these_tests_speak_of():
    assert int(transformers.__version__.split(".")[0]) == 5

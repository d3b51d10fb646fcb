"""A basis of the residual stream: found, proved exact, and cut in."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    BARE_ROW,
    LM_ROW,
    ROWS,
    VISION_ROW,
    Row,
    assert_same_state,
    build,
    difference,
    families,
    gate,
    inputs_of,
    logits_of,
    scattered_plan,
    shuffle_gates,
    state_of,
)
from gate_runs import trainer_of
from narrow_streams import ALL, HIDDEN, two_rows
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from hawada_peft import (
    HawAdaConfig,
    Plan,
    Shape,
    collect_gates,
    init_gates,
    save_slim,
    slim,
    slim_checkpoint,
)
from hawada_peft.basis.basis import Basis, basis_gate, gate_basis, turn_of
from hawada_peft.basis.find import ensure_basis, find_basis, init_basis
from hawada_peft.basis.marks import is_centred, weight_marks
from hawada_peft.basis.moments import collect_moments
from hawada_peft.basis.parts import READER, WRITER, stream_map
from hawada_peft.basis.proof import check_exact, rotation_error
from hawada_peft.basis.refine import principal_directions, refined
from hawada_peft.basis.rotation import rotate, slim_in_basis
from hawada_peft.basis.scales import fit_scales
from hawada_peft.errors import (
    HawAdaError,
    IncompatibleBaseError,
    InvalidPlanError,
    UnsupportedModelError,
    UntiedEmbeddingsWarning,
)
from hawada_peft.gates.bases import WIDTHS, BasisGate, helmert, scale_at
from hawada_peft.gates.hidden import HiddenAdapter, narrow_norm, plain_norm
from hawada_peft.planning.importance import gate_importance
from hawada_peft.refit.reconstruction import reconstruct
from hawada_peft.search.masked import MaskedQuality
from hawada_peft.search.refitted import RefittedQuality
from hawada_peft.vanilla.family import FAMILIES, locate, register_family

pytestmark = pytest.mark.filterwarnings("ignore::hawada_peft.errors.UntiedEmbeddingsWarning")


def calibration(model: nn.Module, seed: int = 0, rows: int = 16) -> list[dict[str, torch.Tensor]]:
    """Two batches that span the stream, of the kind the model takes."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    generator = torch.Generator().manual_seed(seed)
    if base.main_input_name == "pixel_values":
        pixels = torch.randn(2, rows, 3, 16, 16, generator=generator).to(base.dtype)
        return [{"pixel_values": batch} for batch in pixels]
    return [{"input_ids": batch} for batch in torch.randint(128, (2, rows, 16), generator=generator)]


def double_norms(model: PreTrainedModel) -> PreTrainedModel:
    """RMSNorms of transformers compute in float32 whatever they get: torch's own in their place, for the proof."""
    for name, module in list(model.named_modules()):
        if "RMSNorm" in type(module).__name__ and not isinstance(module, nn.RMSNorm):
            norm = nn.RMSNorm(len(module.weight), eps=module.variance_epsilon, dtype=module.weight.dtype)
            norm.weight = module.weight
            model.set_submodule(name, norm)
    return model


def random_basis(model: PreTrainedModel, seed: int = 0) -> Basis:
    """Any basis, with factors of the norms at random."""
    layout, generator = locate(model), torch.Generator().manual_seed(seed)
    size, centred = layout.hidden_size, is_centred(model, layout)
    vectors = torch.linalg.qr(torch.randn(size - centred, size - centred, generator=generator, dtype=torch.float64)).Q
    if centred:
        vectors = torch.cat([vectors.new_full((size, 1), size**-0.5), helmert(size) @ vectors], 1)
    scales = torch.rand(len(WIDTHS), len(layout.norms), generator=generator, dtype=torch.float64) + 0.5
    marks = weight_marks([model.get_parameter(f"{name}.weight") for name in layout.norms])
    return Basis(vectors, scales, marks, centred)


def in_basis(model: PreTrainedModel, *, shuffle: bool = True, **options: Any) -> PeftModel:
    """The model with gates in a random basis, at random values unless `shuffle` is off."""
    basis = random_basis(model)
    gated = gate(model, shuffle=shuffle, rotate=True, **options)
    found = basis_gate(gated.get_base_model(), locate(gated.get_base_model()), "default")
    found.set_basis(basis.vectors, basis.scales, basis.marks)
    return gated


def basis_plan(model: nn.Module, shape: Shape, size: int) -> Plan:
    """A scattered plan that keeps some units of a basis, the mean among them, drawn at random."""
    layout = locate(model.get_base_model() if isinstance(model, PeftModel) else model)
    kept = 1 + torch.randperm(layout.hidden_size - 1, generator=torch.Generator().manual_seed(5))[: size - 1]
    plan = scattered_plan(model, replace(shape, hidden_size=None))
    return replace(
        plan,
        dense=replace(layout.dense, hidden_size=layout.hidden_size),
        hidden=(0, *sorted(kept.tolist())),
        rotated=True,
    )


# ------------------------------------------------------------------ helmert


def test_helmert_is_an_orthonormal_basis_of_what_sums_to_zero() -> None:
    basis = helmert(7)
    assert torch.allclose(basis.T @ basis, torch.eye(6, dtype=torch.float64))
    assert basis.sum(0).abs().max() < 1e-12


def test_the_first_rows_of_helmert_are_the_smaller_one_and_constants() -> None:
    rows = helmert(9)[:5]
    assert torch.equal(rows[:, :4], helmert(5))
    assert torch.equal(rows[:, 4:], rows[:1, 4:].expand(5, -1))


def test_factors_between_known_widths_lie_on_straight_lines() -> None:
    scales = torch.tensor(WIDTHS)[:, None] * torch.tensor([1.0, 2.0])
    for part in (0.25, 0.4, 0.5, 0.9, 1.0):
        assert torch.allclose(scale_at(scales, part), part * torch.tensor([1.0, 2.0]))
    assert torch.equal(scale_at(scales, 0.01), scales[0])


@pytest.mark.parametrize("spread", [0.0, 3.0])
@pytest.mark.parametrize("kind", [nn.RMSNorm, nn.LayerNorm])
def test_factors_take_up_what_a_narrow_norm_makes_of_eps(kind: type[nn.Module], spread: float) -> None:
    """
    A narrow norm's mean square is d/k times the dense one's where nothing of the stream is cut, so its eps should be.
    With eps as it is the ratio is the same for positions of equal length, and the factor gives exactly that; others
    differ by no more than half of eps (d/k - 1) in their mean squares.
    """
    size, kept, generator = 32, 8, torch.Generator().manual_seed(0)
    norm = kind(size, eps=1e-2, dtype=torch.float64)
    vectors = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    if kind is nn.LayerNorm:
        vectors = torch.cat([torch.full((size, 1), size**-0.5, dtype=torch.float64), helmert(size)], 1)
    units = vectors[:, :kept] - vectors[:, :kept].mean(0) * (kind is nn.LayerNorm)
    x = torch.randn(100, kept, generator=generator, dtype=torch.float64) @ units.T
    length = 1 + spread * torch.rand(100, 1, generator=generator, dtype=torch.float64)
    x = x / x.norm(dim=1, keepdim=True) * length
    narrow, wanted = narrow_norm(norm, x, units), plain_norm(norm, x) @ units
    factor = (narrow * wanted).sum() / narrow.square().sum()
    error = ((narrow * factor - wanted).norm(dim=1) / wanted.norm(dim=1)).max()
    least = (x @ units).square().mean(1).min()
    assert error <= 1e-12 + (spread > 0) * float(1e-2 * (size / kept - 1) / (2 * least))
    assert (error > 1e-4) == (spread > 0)


@two_rows
def test_factors_bring_the_first_norm_to_its_dense_size(row: Row) -> None:
    """Nothing has gone wrong before it: the factor is the mean length of what is kept."""
    model = build(row, torch.float64)
    layout, batches, basis = locate(model), calibration(model), random_basis(model)
    scales = fit_scales(model, layout, batches, basis.vectors, centred=basis.centred)
    inputs: list[torch.Tensor] = []
    norm = model.get_submodule(layout.norms[0])
    with torch.no_grad():
        handle = norm.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        model(**batches[0])
        handle.remove()
        lengths = (plain_norm(norm, inputs[0]) @ basis.vectors[:, :32]).norm(dim=-1) / 32**0.5
    assert abs(float(scales[WIDTHS.index(1 / 2), 0]) - float(lengths.mean())) < 1e-3
    assert torch.equal(scales[-1], torch.ones_like(scales[-1]))
    assert (scales[WIDTHS.index(1 / 2)] < scales[WIDTHS.index(7 / 8)]).any()


# ------------------------------------------------------------------- exact


@pytest.mark.parametrize("tied", [False, True])
def test_rotation_is_exact_in_float64(row: Row, tied: bool) -> None:
    fields = {"tie_word_embeddings": True} if tied and "vocab_size" in row.fields else {}
    model = build(row, torch.float64, **fields)
    basis = replace(random_basis(model), scales=torch.ones(len(WIDTHS), 9, dtype=torch.float64))
    before = state_of(model)
    turned = slim_in_basis(model, Plan.keep_all(locate(model).dense), basis)
    assert_same_state(state_of(model), before)
    assert type(turned) is type(model)
    found, dense = logits_of(double_norms(turned)), logits_of(double_norms(model))
    if model is model.base_model:
        found = turn_of(model, locate(model), basis).restored(model, found)
    assert difference(found, dense) <= 1e-12


def test_rotation_is_exact_in_float32(row: Row) -> None:
    if row.model.endswith("Model"):
        return
    model = build(row)
    turned = rotate(model, calibration(model))
    assert difference(logits_of(turned), logits_of(model)) <= 1e-5
    weights = [turned.get_parameter(f"{name}.weight") for name in locate(turned).norms]
    assert all((weight == 1).all() for weight in weights)


def test_the_copy_that_proves_it_does_not_run_the_models_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash attention takes numbers of half precision alone."""

    def half_only(module: nn.Module, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        assert query.dtype == torch.bfloat16
        return sdpa_attention_forward(module, query, *args, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "half_only", half_only)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "half_only", sdpa_mask)
    base = build(LM_ROW).to(torch.bfloat16)
    base.set_attn_implementation("half_only")
    rotated = rotate(base, calibration(base))
    assert rotated.config._attn_implementation == base.config._attn_implementation == "half_only"


def test_the_proof_would_notice_a_wrong_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = locate(build(VISION_ROW))
    assert rotation_error(layout) < 1e-12
    row = replace(FAMILIES["dinov2"], stream_scales=())
    with monkeypatch.context() as patch:
        patch.setitem(FAMILIES, "dinov2", row)
        with pytest.raises(UnsupportedModelError, match="cannot be rotated exactly"):
            check_exact(locate(build(ROWS["dinov2"])))


@pytest.mark.parametrize(
    ("model_type", "norms"),
    [("olmo2", ("post_attention_layernorm", "post_feedforward_layernorm")), ("gemma2", ("input_layernorm",))],
)
def test_families_with_norms_behind_their_blocks_are_refused(
    model_type: str, norms: tuple[str, ...], rows_of_families: None
) -> None:
    register_family(model_type, replace(FAMILIES["mistral"], hidden_norms=norms))
    model = build(replace(LM_ROW, model={"olmo2": "Olmo2ForCausalLM", "gemma2": "Gemma2ForCausalLM"}[model_type],
                          config={"olmo2": "Olmo2Config", "gemma2": "Gemma2Config"}[model_type]))  # fmt: skip
    before = state_of(model)
    with pytest.raises(UnsupportedModelError, match="cannot be rotated exactly"):
        rotate(model, calibration(model))
    with pytest.raises(UnsupportedModelError):
        get_peft_model(model, HawAdaConfig(gates=("hidden",), rotate=True))
    assert_same_state(state_of(model), before)


def test_every_reader_names_its_norm() -> None:
    parts = stream_map(locate(build(ROWS["dinov2"])))
    assert {name: part.partner for name, part in parts.items() if part.kind == READER} == {
        "attention.q_proj.weight": "norm1",
        "attention.k_proj.weight": "norm1",
        "attention.v_proj.weight": "norm1",
        "mlp.fc1.weight": "norm2",
        ".classifier.weight": ".dinov2.layernorm",
    }
    assert parts[".classifier.weight"].stretches == 2
    assert parts["mlp.fc2.weight"].partner == "layer_scale2.lambda1"
    assert parts[".dinov2.embeddings.cls_token"].kind == WRITER


# -------------------------------------------------------------------- tied


def test_untied_embeddings_say_what_they_cost() -> None:
    model = build(LM_ROW, tie_word_embeddings=True)
    with pytest.warns(UntiedEmbeddingsWarning, match="128 x 64 parameters of its own"):
        turned = rotate(model, calibration(model))
    assert turned.get_output_embeddings().weight is not turned.get_input_embeddings().weight
    assert not turned.config.tie_word_embeddings


def test_embeddings_stay_tied_where_the_last_norm_has_one_weight() -> None:
    model = build(LM_ROW, tie_word_embeddings=True)
    model.model.norm.weight.data.fill_(1.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        turned = rotate(model, calibration(model))
    assert turned.get_output_embeddings().weight is turned.get_input_embeddings().weight
    assert difference(logits_of(turned), logits_of(model)) <= 1e-5


def test_embeddings_can_be_kept_tied_at_a_price() -> None:
    model = build(LM_ROW, tie_word_embeddings=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        turned = rotate(model, calibration(model), keep_tied=True)
    assert turned.get_output_embeddings().weight is turned.get_input_embeddings().weight
    assert 1e-5 < difference(logits_of(turned), logits_of(model)) < 0.3


# ------------------------------------------------------------------- found


def test_the_caller_finds_everything_as_it_was(row: Row) -> None:
    model = build(row).train()
    before, random_state = state_of(model), torch.get_rng_state()
    basis = find_basis(model, calibration(model))
    assert_same_state(state_of(model), before)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.allclose(basis.vectors.T @ basis.vectors, torch.eye(64), atol=1e-5)
    assert basis.centred == isinstance(model.get_submodule(locate(model).norms[0]), nn.LayerNorm)


def test_a_basis_depends_on_the_seed_alone() -> None:
    model = build(LM_ROW)
    first, again, other = (find_basis(model, calibration(model), seed=seed).vectors for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_padding_does_not_count() -> None:
    model = build(LM_ROW)
    batch = calibration(model)[0]["input_ids"]
    padded = {
        "input_ids": nn.functional.pad(batch, (0, 4)),
        "attention_mask": nn.functional.pad(torch.ones_like(batch), (0, 4)),
    }
    plain, found = (collect_moments(model, locate(model), [each]) for each in ({"input_ids": batch}, padded))
    assert plain.positions == found.positions == batch.numel()
    assert torch.allclose(plain.stream, found.stream, rtol=1e-4, atol=1e-3)


def test_directions_come_in_the_order_of_what_they_carry() -> None:
    moments = torch.diag_embed(torch.tensor([[1.0, 5, 3], [30, 10, 20]]))
    found = principal_directions(moments)
    # 1/9 + 30/60, 5/9 + 10/60, 3/9 + 20/60
    assert found.abs().argmax(0).tolist() == [1, 2, 0]


def test_refinement_lowers_the_loss_that_it_is_about() -> None:
    generator = torch.Generator().manual_seed(0)
    stream, gradient = (x @ x.mT for x in torch.randn(2, 3, 24, 40, generator=generator, dtype=torch.float64))
    gradient = (
        gradient
        * torch.linspace(0.1, 3, 24, dtype=torch.float64)[:, None]
        * torch.linspace(0.1, 3, 24, dtype=torch.float64)
    )
    start = principal_directions(stream)

    def lost(basis: torch.Tensor, kept: int) -> float:
        cut = basis[:, kept:] @ basis[:, kept:].T
        return float(sum((g @ cut @ c @ cut).trace() / (g @ c).trace() for g, c in zip(gradient, stream, strict=True)))

    found = refined(start, stream, gradient)
    assert torch.allclose(found.T @ found, torch.eye(24, dtype=torch.float64))
    for kept in (8, 12, 18):
        assert lost(found, kept) < lost(start, kept)


def test_a_single_output_has_a_basis_too() -> None:
    model = build(VISION_ROW, num_labels=1)
    moments = collect_moments(model, locate(model), calibration(model))
    assert moments.gradient.abs().sum((1, 2)).min() > 0


def test_the_first_directions_of_a_trained_stream_keep_more_than_others() -> None:
    model = build(LM_ROW, torch.float64)
    with torch.no_grad():  # a stream that lies in 20 directions, none of them a channel
        draw = torch.randn(64, 64, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        weak = torch.linalg.qr(draw).Q * torch.where(torch.arange(64) < 20, 1.0, 0.01)
        for name, part in stream_map(locate(model)).items():
            if part.kind == WRITER:
                for full in [n for n, _ in model.named_parameters() if n == name[1:] or n.endswith(f".{name}")]:
                    tensor = model.get_parameter(full)
                    tensor.copy_((tensor.movedim(part.dim, -1) @ weak).movedim(-1, part.dim))
    basis = find_basis(model, calibration(model))
    dense, layout = logits_of(model), locate(model)

    def at(kept: list[int]) -> float:
        plan = replace(
            Plan.keep_all(layout.dense),
            dense=replace(layout.dense, hidden_size=layout.hidden_size),
            hidden=tuple(kept),
            rotated=True,
        )
        return difference(logits_of(slim_in_basis(model, plan, basis)), dense)

    assert at(list(range(24))) < 0.1
    assert at(list(range(40, 64))) > 5 * at(list(range(24)))


# --------------------------------------------------- the rotated model as it is


@two_rows
def test_a_rotated_model_is_cut_by_the_first_channels(row: Row) -> None:
    """Every number of first channels is what the basis keeps of it, also after LayerNorms, which see their mean."""
    model = build(row, torch.float64)
    basis = replace(random_basis(model), scales=torch.ones(len(WIDTHS), 9, dtype=torch.float64))
    layout = locate(model)
    turned = slim_in_basis(model, Plan.keep_all(layout.dense), basis)
    for size in (32, 40):
        plan = replace(
            Plan.keep_all(layout.dense),
            dense=replace(layout.dense, hidden_size=layout.hidden_size),
            hidden=tuple(range(size)),
        )
        expected = logits_of(double_norms(slim_in_basis(model, replace(plan, rotated=True), basis)))
        assert difference(logits_of(double_norms(slim(turned, plan))), expected) <= 1e-12


# -------------------------------------------------------------- gates in it


@two_rows
def test_output_is_unchanged_at_the_start(row: Row) -> None:
    model = build(row)
    dense = logits_of(model)
    assert torch.equal(logits_of(in_basis(model, shuffle=False, gates=ALL)), dense)


@pytest.fixture(params=families(ROWS))
def named(request: pytest.FixtureRequest) -> tuple[Row, int]:
    return ROWS[request.param], HIDDEN.get(request.param, 44)


def test_masked_is_slim_in_float64(named: tuple[Row, int]) -> None:
    row, size = named
    model = build(row, torch.float64)
    dense = logits_of(model)
    model = in_basis(model, gates=ALL)
    plan = basis_plan(model, row.slim, size)
    model.apply_plan(plan)
    double_norms_below(model)
    masked = logits_of(model)
    assert difference(masked, dense) > 0.01
    base = model.get_base_model()
    basis = gate_basis(basis_gate(base, locate(base), "default"))
    factor = basis_gate(base, locate(base), "default").soft()
    small = model.merge_and_unload()
    assert locate(small).hidden_size == size
    found = logits_of(double_norms(small))
    if row.model.endswith("Model"):
        found = turn_of(base, locate(base), basis, torch.tensor(plan.hidden), factor).restored(base, found)
    assert difference(found, masked) <= 1e-12


def double_norms_below(model: PeftModel) -> None:
    for module in model.modules():
        base = getattr(module, "base_layer", None)
        if base is not None and "RMSNorm" in type(base).__name__:
            norm = nn.RMSNorm(len(base.weight), eps=base.variance_epsilon, dtype=base.weight.dtype)
            norm.weight = base.weight
            module.base_layer = norm
    double_norms(model.get_base_model())


def test_masked_is_slim_in_float32_and_on_disk(named: tuple[Row, int], tmp_path: Path) -> None:
    row, size = named
    if row.model.endswith("Model"):
        return
    base = build(row)
    base.save_pretrained(tmp_path / "base")
    model = in_basis(base, gates=ALL)
    plan = basis_plan(model, row.slim, size)
    model.apply_plan(plan)
    masked = logits_of(model)
    model.save_pretrained(tmp_path / "adapter")
    small = model.merge_and_unload()
    assert difference(logits_of(small), masked) <= 1e-5
    save_slim(small, tmp_path / "slim", reference=masked, inputs=inputs_of(small))

    again = PeftModel.from_pretrained(build(row), tmp_path / "adapter").eval()
    assert again.applied_plan() == plan
    assert torch.equal(logits_of(again), masked)
    assert_same_state(state_of(again.merge_and_unload()), state_of(small))

    slim_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "streamed", verify="full")
    for file in (tmp_path / "slim").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "streamed" / file.name).read_bytes()
    assert (tmp_path / "slim" / "config.json").read_text() == (tmp_path / "streamed" / "config.json").read_text()


@two_rows
def test_soft_gates_fold_without_a_plan(row: Row) -> None:
    model = in_basis(build(row, torch.float64), gates=("hidden",))
    double_norms_below(model)
    soft = logits_of(model)
    model.merge_adapter()
    assert difference(logits_of(model), soft) <= 1e-12
    model.unmerge_adapter()
    small = model.merge_and_unload()
    assert not isinstance(small, PeftModel)
    assert difference(logits_of(small), soft) <= 1e-6


@two_rows
def test_unloading_restores_every_bit(row: Row) -> None:
    base = build(row)
    before = state_of(base)
    model = in_basis(base, gates=ALL)
    model.apply_plan(basis_plan(model, Shape().complete(locate(base).dense), 32))
    model.merge_adapter()
    model.unmerge_adapter()
    assert_same_state(state_of(model.unload()), before)


@two_rows
def test_the_mean_always_stays(row: Row) -> None:
    model = in_basis(build(row), gates=("hidden",))
    shuffled = collect_gates(shuffle_gates(model))
    next(iter(shuffled.values())).theta.data[0] = -9
    kept = model.plan(Shape(hidden_size=32)).hidden
    assert (0 in kept) == (row is VISION_ROW)
    if row is VISION_ROW:
        plan = replace(
            basis_plan(model, Shape().complete(locate(model.get_base_model()).dense), 32), hidden=tuple(range(1, 33))
        )
        with pytest.raises(InvalidPlanError, match="its mean"):
            model.merge_and_unload(plan=plan)


def test_untrained_gates_keep_the_first_directions() -> None:
    model = in_basis(build(VISION_ROW), gates=("hidden",), shuffle=False)
    assert model.plan(Shape(hidden_size=40)).hidden == tuple(range(40))


def test_the_basis_is_saved_with_the_adapter_and_stays_float32(tmp_path: Path) -> None:
    model = gate(build(LM_ROW, torch.bfloat16), shuffle=False, gates=("hidden",), rotate=True)
    basis = init_basis(model, calibration(model)).stream
    assert basis is not None
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    (vectors,) = [tensor for name, tensor in saved.items() if name.endswith(".vectors")]
    assert torch.equal(vectors, basis.vectors)
    assert basis.nbytes == sum(t.nbytes for name, t in saved.items() if not name.endswith("theta"))
    found = basis_gate(model.get_base_model().half(), locate(model.get_base_model()), "default")
    assert found.vectors.dtype == torch.float32
    assert torch.equal(found.vectors, vectors)


def test_a_basis_and_its_gates_learn(tmp_path: Path) -> None:
    model = gate(build(LM_ROW), shuffle=False, gates=("hidden",), rotate=True).train()
    init_basis(model, calibration(model))
    model(**inputs_of(model)).logits.square().mean().backward()
    (found,) = collect_gates(model).values()
    assert isinstance(found, BasisGate)
    assert torch.count_nonzero(found.theta.grad) == 64
    assert not found.vectors.requires_grad


# --------------------------------------------------------------- bad input


def test_too_few_positions_are_refused() -> None:
    model = build(LM_ROW)
    with pytest.raises(HawAdaError, match="hold 8 positions, which over all norms span"):
        rotate(model, [{"input_ids": torch.arange(8)[None] % 2}])


def test_no_batches_are_refused() -> None:
    with pytest.raises(HawAdaError, match="no calibration batches"):
        rotate(build(LM_ROW), [])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_statistics_are_refused(value: float) -> None:
    model = build(VISION_ROW)
    batches = calibration(model)
    batches[1]["pixel_values"][0, 0, 0, 0] = value
    with pytest.raises(HawAdaError, match="NaN or infinity"):
        rotate(model, batches)


def test_adapters_are_refused() -> None:
    model = gate(build(LM_ROW)).get_base_model()
    with pytest.raises(UnsupportedModelError, match="has adapters in it"):
        rotate(model, [])


def test_a_base_that_was_rotated_since_is_refused() -> None:
    model = build(LM_ROW)
    basis = random_basis(model)
    turned = slim_in_basis(model, Plan.keep_all(locate(model).dense), basis)
    with pytest.raises(IncompatibleBaseError, match="found on another model"):
        slim_in_basis(turned, Plan.keep_all(locate(model).dense), basis)


@pytest.mark.parametrize("fields", [{"num_hidden_layers": 2}, {"hidden_size": 32}], ids=["layers", "hidden"])
def test_a_base_that_was_cut_since_is_refused(fields: dict[str, int]) -> None:
    basis, small = random_basis(build(LM_ROW)), build(LM_ROW, **fields)
    with pytest.raises(IncompatibleBaseError, match="found on another model"):
        slim_in_basis(small, Plan.keep_all(locate(small).dense), basis)


@pytest.mark.parametrize("shared", ["self_attn.q_proj", "input_layernorm", "mlp"])
def test_weights_that_are_shared_unknown_to_the_row_are_refused(shared: str) -> None:
    model = build(LM_ROW)
    model.model.layers[1].set_submodule(shared, model.model.layers[0].get_submodule(shared))
    before = state_of(model)
    with pytest.raises(UnsupportedModelError, match=rf"layers\.0\.{shared}.*layers\.1\.{shared}.* are one tensor"):
        rotate(model, calibration(model))
    assert_same_state(state_of(model), before)


def test_a_basis_needs_gates_on_the_stream() -> None:
    with pytest.raises(HawAdaError, match="rotate is about the gate on 'hidden'"):
        HawAdaConfig(rotate=True)
    model = gate(build(BARE_ROW))
    with pytest.raises(UnsupportedModelError, match="no gates in a basis"):
        init_basis(model, calibration(model))


def test_a_plain_norm_has_weight_one() -> None:
    norm = build(LM_ROW).model.norm
    x = torch.randn(2, 64)
    assert torch.allclose(plain_norm(norm, x) * norm.weight, norm(x))
    assert plain_norm(norm, x[:, :10]).square().mean(-1).sqrt().sub(1).abs().max() < 1e-4


@two_rows
def test_a_norm_in_a_basis_compiles_without_a_break(row: Row) -> None:
    model = in_basis(build(row), gates=("hidden",))
    model.apply_plan(basis_plan(model, Shape().complete(locate(model.get_base_model()).dense), 32))
    adapter = next(module for module in model.modules() if isinstance(module, HiddenAdapter))
    x = torch.randn(2, 3, 64)
    compiled = torch.compile(adapter, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), adapter(x))


# --------------------------------------------------------- refitted, searched


@pytest.mark.filterwarnings("ignore:the slim model keeps its plain weights")
@pytest.mark.parametrize("rotate", [False, True])
@two_rows
def test_a_narrower_stream_is_refitted_to_the_dense_one(row: Row, rotate: bool) -> None:
    base = build(row)
    before, dense = state_of(base), logits_of(base)
    model = gate(base, shuffle=False, gates=("hidden", "ffn"), rotate=rotate)
    batches = [{**batch} for seed in range(3) for batch in calibration(model, seed)]
    if rotate:
        init_basis(model, batches)
    model.apply_plan(model.plan(Shape(hidden_size=40, intermediate_size=64)))
    plain = difference(logits_of(model), dense)
    slimmed = model.slim(calibration=batches)
    assert slimmed.model.config.hidden_size == 40
    assert all(refit.after <= refit.before for refit in slimmed.reconstruction.refits)
    assert any(refit.damping is not None for refit in slimmed.reconstruction.refits)
    assert difference(logits_of(slimmed.model), dense) < 1.2 * plain
    assert_same_state(state_of(base), before)


def test_a_refit_that_would_not_help_is_not_kept_in_part() -> None:
    model = build(LM_ROW)
    layout = locate(model)
    dense = replace(layout.dense, hidden_size=layout.hidden_size)
    plan = replace(Plan.keep_all(layout.dense), dense=dense, hidden=tuple(range(32)), rotated=True)
    small = slim_in_basis(model, plan, random_basis(model))
    with pytest.raises(HawAdaError, match="coordinates"):
        reconstruct(model, small, plan, calibration(model))


@pytest.mark.parametrize("quality", [MaskedQuality, RefittedQuality])
def test_a_search_judges_directions(quality: type[MaskedQuality]) -> None:
    model = gate(build(LM_ROW), shuffle=False, gates=("ffn", "hidden"), rotate=True)
    batches = calibration(model)
    init_basis(model, batches)
    judge = quality(model, batches, gate_importance(model, batches))
    plan = judge.plan(Shape(hidden_size=48).complete(locate(model.get_base_model()).dense))
    assert plan.hidden == tuple(range(48))
    assert plan.rotated
    assert 0 < judge.evaluate(Shape(hidden_size=56)) < judge.evaluate(Shape(hidden_size=16))


def test_gates_start_in_the_order_of_the_basis() -> None:
    model = gate(build(VISION_ROW), shuffle=False, gates=("hidden",), rotate=True)
    init_basis(model, calibration(model))
    init_gates(model, calibration(model))
    (found,) = collect_gates(model).values()
    assert (found.theta.diff() < 0).all()


def test_a_basis_is_found_once() -> None:
    model = gate(build(LM_ROW), shuffle=False, gates=("hidden",), rotate=True)
    ensure_basis(model, calibration(model))
    (found,) = collect_gates(model).values()
    first = found.vectors.clone()
    ensure_basis(model, calibration(model, seed=1))
    assert torch.equal(found.vectors, first)


def test_plans_of_channels_and_of_directions_do_not_mix() -> None:
    channels, directions = gate(build(LM_ROW), gates=("hidden",)), in_basis(build(LM_ROW), gates=("hidden",))
    first, second = channels.plan(Shape(hidden_size=40)), directions.plan(Shape(hidden_size=40))
    assert Plan.from_json(second.to_json()) == second
    assert (first.rotated, second.rotated) == (False, True)
    with pytest.raises(InvalidPlanError, match="the adapter has none"):
        channels.apply_plan(second)
    with pytest.raises(InvalidPlanError, match="gates directions"):
        directions.apply_plan(first)
    with pytest.raises(InvalidPlanError, match="saved with the adapter"):
        slim(build(LM_ROW), second)
    with pytest.raises(InvalidPlanError, match="directions of a basis are to be cut"):
        slim_in_basis(build(LM_ROW), first, random_basis(build(LM_ROW)))


def test_a_trainer_finds_the_basis_that_nobody_has(tmp_path: Path) -> None:
    base = build(LM_ROW)
    model = gate(base, shuffle=False, gates=("ffn", "hidden"), rotate=True)
    trainer = trainer_of(tmp_path, model, shape=Shape(hidden_size=40, intermediate_size=64), calibration_examples=8)
    trainer.train()
    plan = trainer.model.applied_plan()
    assert plan.rotated
    assert plan.shape.hidden_size == 40
    found = basis_gate(base, locate(base), "default")
    assert found.marks.any()
    masked = logits_of(trainer.model)
    assert difference(logits_of(trainer.model.merge_and_unload()), masked) <= 1e-5

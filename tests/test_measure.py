"""The clock, without one: fake time, fake devices, tiny models."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

from hawada_peft.errors import HawAdaError, InvalidRegimeError, UnsettledTimingWarning
from hawada_peft.latency import runner as runner_module
from hawada_peft.latency.budget import LatencyBudget
from hawada_peft.latency.clock import Clock
from hawada_peft.latency.effort import Effort
from hawada_peft.latency.measuring import interleave, measure_built, measure_many
from hawada_peft.latency.regime import Conditions, Regime
from hawada_peft.latency.runner import Runner, prepare
from hawada_peft.latency.timing import Timing, median_errors
from hawada_peft.latency.toy import ToyClock, toy_law


class Machine(Clock):
    """Time passes when something is called; the calls are written down."""

    def __init__(self, seconds: Callable[[Any], float] = lambda model: 1e-3) -> None:
        self.time, self.calls, self.waits, self.law = 0.0, [], 0, seconds

    def now(self) -> float:
        return self.time

    def wait(self, regime: Regime) -> None:
        self.waits += 1

    def runner(self, model: Any, regime: Regime, reset_seconds: float = 0.0) -> Runner:
        def call() -> None:
            self.calls.append(model)
            self.time += self.law(model)

        def reset() -> None:
            self.time += reset_seconds

        return Runner(call, reset)


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=32,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def vit() -> ViTForImageClassification:
    config = ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
    )
    return ViTForImageClassification(config).eval()


def test_a_regime_survives_json() -> None:
    regime = Regime(mode="decode", batch_size=2, seq_len=8, dtype="bfloat16", backend="compile")
    assert Regime.from_dict(regime.to_dict()) == regime


def test_a_regime_names_every_problem() -> None:
    with pytest.raises(InvalidRegimeError) as caught:
        Regime(mode="prefil", batch_size=0, dtype="int8", backend="cuda_graph")
    for part in ("mode must be one of", "batch_size", "dtype must be one of", "needs a CUDA device"):
        assert part in str(caught.value)
    with pytest.raises(InvalidRegimeError, match="needs seq_len"):
        Regime(mode="decode")
    with pytest.raises(InvalidRegimeError, match="unknown fields"):
        Regime.from_dict({"batch": 1})


def test_candidates_are_timed_in_turns() -> None:
    machine = Machine()
    runners = [machine.runner(name, Regime(), reset_seconds=5.0) for name in "abc"]
    effort = Effort(warmup=1, lead_in=1, min_rounds=4, max_rounds=4, max_seconds=1e9, clock=machine)
    samples = interleave(runners, Regime(), effort)
    assert "".join(machine.calls) == "abc" + "aabbccccbbaa" * 2
    np.testing.assert_allclose(samples, np.ones((3, 4)), rtol=1e-6)  # resets are not timed
    assert machine.waits == 2 * 12


def test_long_calls_need_no_other_before_them() -> None:
    machine = Machine(lambda name: 1.0 if name == "a" else 1e-3)
    runners = [machine.runner(name, Regime()) for name in "ab"]
    effort = Effort(warmup=3, lead_in=1, min_rounds=2, max_rounds=2, max_seconds=1e9, clock=machine)
    samples = interleave(runners, Regime(), effort)
    assert "".join(machine.calls) == "aabbb" + "abb" + "bba"
    np.testing.assert_allclose(samples, [[1e3, 1e3], [1, 1]], rtol=1e-6)


def test_rounds_end_when_medians_have_settled_or_time_is_up() -> None:
    def rounds(machine: Machine, **changes: float) -> int:
        effort = Effort(**({"min_rounds": 5, "max_rounds": 30, "max_seconds": 1e9, "clock": machine} | changes))
        return interleave([machine.runner("a", Regime())], Regime(), effort).shape[1]

    rng = np.random.default_rng(0)
    shaky = Machine(lambda model: float(rng.exponential()))
    assert rounds(Machine()) == 5
    assert rounds(shaky) == 30
    assert rounds(shaky, max_seconds=0.0) == 5


@pytest.mark.parametrize("seconds", [float("nan"), 0.0, -1.0, float("inf")])
def test_a_clock_that_tells_no_time_is_refused(seconds: float) -> None:
    with pytest.raises(HawAdaError, match="no time that passes"):
        measure_many({"a": nn.Identity()}, Regime(), effort=Effort(clock=Machine(lambda model: seconds)))


def test_drift_that_all_candidates_share_is_taken_out() -> None:
    rng = np.random.default_rng(0)
    drift = np.exp(rng.normal(0, 0.3, 41))
    true = np.array([1.0, 2.0, 5.0])
    medians, errors = median_errors(true[:, None] * drift)
    np.testing.assert_allclose(medians[1:] / medians[0], [2.0, 5.0], rtol=1e-9)
    assert errors.max() < 1e-9
    assert median_errors(true[:1, None] * drift)[1][0] > 0.02


@pytest.mark.parametrize("mode", ["forward", "prefill", "decode"])
def test_a_language_model_is_timed_in_every_mode(llama: LlamaForCausalLM, mode: str) -> None:
    ticks = iter(range(1000))
    effort = Effort(min_rounds=3, clock=Clock(lambda: float(next(ticks))))
    timing = measure_many({"model": llama}, Regime(mode=mode, batch_size=2, seq_len=8), effort=effort)["model"]
    assert timing.median_ms == pytest.approx(1000.0)
    assert timing.settled
    assert timing.rounds == 3
    assert timing.regime.mode == mode
    assert timing.versions["torch"] == torch.__version__
    assert "threads" in timing.device_name
    assert Timing.from_dict(timing.to_dict()) == timing
    assert "1000.000 ms" in str(timing)


@pytest.mark.parametrize("backend", ["eager", "compile"])
def test_decode_is_one_token_on_a_filled_cache(
    llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    monkeypatch.setattr(runner_module, "_compiled", lambda model, regime: model)  # the static cache, uncompiled
    regime = Regime(mode="decode", batch_size=2, seq_len=8, backend=backend)
    runner = prepare(llama, regime)
    with torch.inference_mode():
        outputs = []
        for _ in range(3):
            outputs.append(runner.call().logits)
            runner.reset()
        tokens = runner_module.make_inputs(llama, regime)["input_ids"]
        whole = llama(torch.cat([tokens, tokens[:, -1:]], dim=1)).logits[:, -1:]
    for output in outputs:
        torch.testing.assert_close(output, whole, rtol=1e-4, atol=1e-5)


def test_static_caches_of_more_tokens_than_are_in_them_give_the_same(llama: LlamaForCausalLM) -> None:
    outputs = {}
    for mode in ("prefill", "decode"):
        for cache in (None, 9, 20):
            runner = prepare(llama, Regime(mode=mode, batch_size=2, seq_len=8, static_cache=cache))
            with torch.inference_mode():
                for _ in range(2):
                    outputs[mode, cache] = runner.call().logits
                    runner.reset()
    for (mode, _), output in outputs.items():
        torch.testing.assert_close(output, outputs[mode, None], rtol=1e-4, atol=1e-5)


def test_whole_answers_are_a_prefill_and_steps_of_decode() -> None:
    regime = LatencyBudget(speedup=2, prompt=512, output=128, batch_size=4).regime(
        generates=True, dtype=torch.float32, device="cpu"
    )
    assert (regime.mode, regime.length, regime.cached_tokens) == ("generate", 640, 640)
    assert str(regime) == "generate 4x(512+128), float32, eager, cpu"
    assert Regime.from_dict(regime.to_dict()) == regime
    (once, prefill), (often, decode) = regime.parts()
    assert (once, prefill) == (1, Regime(mode="prefill", batch_size=4, seq_len=512))
    # Its steps find 512 to 638 tokens in the cache.
    assert (often, decode) == (127, Regime(mode="decode", batch_size=4, seq_len=575))
    fixed = replace(regime, backend="compile").parts()
    assert [part.static_cache for _, part in fixed] == [None, 640]
    assert [part.static_cache for _, part in replace(regime, static_cache=1024).parts()] == [1024, 1024]
    assert prefill.parts() == ((1, prefill),)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt": 8}, "whole answers need prompt and output"),
        ({"mode": "generate"}, "whole answers need prompt and output.*got neither"),
        ({"mode": "generate", "seq_len": 8}, "whole answers need prompt and output"),
        ({"prompt": 8, "output": 1}, "output must be a whole number of at least 2"),
        ({"prompt": 8, "output": 4, "mode": "decode"}, "are for mode 'generate'"),
        ({"prompt": 8, "output": 4, "seq_len": 8}, "either seq_len or prompt and output"),
        ({"prompt": 8, "output": 4, "static_cache": 11}, "must hold the 12 tokens"),
        ({"mode": "decode", "seq_len": 8, "static_cache": 8}, "must hold the 9 tokens"),
        ({"mode": "forward", "static_cache": 8}, "is for modes with a KV cache"),
    ],
)
def test_conditions_that_contradict_themselves(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRegimeError, match=message):
        Conditions(**given)


def test_parts_of_a_whole_answer_are_timed_in_the_same_rounds_and_added(llama: LlamaForCausalLM) -> None:
    regime = Regime(mode="generate", prompt=8, output=5, batch_size=2)
    clock = ToyClock(lambda model, part: {"prefill": 7.0, "decode": 0.5}[part.mode] * part.batch_size)
    timing = measure_many({"a": llama}, regime, effort=Effort(min_rounds=3, clock=clock))["a"]
    assert timing.median_ms == pytest.approx(14 + 4 * 1.0)
    assert (timing.regime, timing.rounds) == (regime, 3)
    ticks = iter(range(1000))
    real = Effort(min_rounds=3, clock=Clock(lambda: float(next(ticks))))
    assert measure_many({"a": llama}, regime, effort=real)["a"].median_ms == pytest.approx(5e3)


def test_prefill_gives_the_last_logits_and_fills_a_cache(llama: LlamaForCausalLM) -> None:
    with torch.inference_mode():
        output = prepare(llama, Regime(mode="prefill", batch_size=2, seq_len=8)).call()
    assert output.logits.shape == (2, 1, 64)
    assert output.past_key_values.get_seq_length() == 8


def test_an_image_model_is_timed_forward(vit: ViTForImageClassification) -> None:
    with torch.inference_mode():
        assert prepare(vit, Regime(batch_size=3)).call().logits.shape == (3, 2)


def test_what_a_model_cannot_do_is_refused(llama: LlamaForCausalLM, vit: ViTForImageClassification) -> None:
    for model, regime, message in (
        (vit, Regime(mode="prefill", seq_len=4), "does not generate"),
        (vit, Regime(seq_len=4), "takes images"),
        (llama, Regime(), "needs seq_len"),
        (llama, Regime(seq_len=4, dtype="bfloat16"), "the regime asks for bfloat16"),
        (llama, Regime(mode="decode", seq_len=32), "has 32 positions, the regime needs 33"),
        (nn.Linear(2, 2), Regime(), "only transformers models"),
    ):
        with pytest.raises(InvalidRegimeError, match=message):
            prepare(model, regime)


def test_a_timer_that_never_settles_is_reported_with_its_spread() -> None:
    rng = np.random.default_rng(0)
    machine = Machine(lambda model: float(rng.exponential()))
    effort = Effort(min_rounds=5, max_rounds=20, max_seconds=1e9, clock=machine)
    told = r"1 of 1 timers did not settle within 20 rounds.*IQR"
    with pytest.warns(UnsettledTimingWarning, match=told) as caught:
        timing = measure_many({"a": nn.Identity()}, Regime(), effort=effort)["a"]
    assert not timing.settled
    assert [warning.filename for warning in caught] == [__file__]


def test_groups_are_tied_by_their_reference() -> None:
    """The machine gets slower with every group; the result does not show it."""
    alive: list[int] = []
    speed = {"now": 1.0}

    class Model(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.size = size

    def build(size: int) -> nn.Module:
        if size == 10:  # the reference comes first in each group
            speed["now"] *= 1.5
            alive.clear()
        alive.append(size)
        assert len(alive) <= 3
        return Model(size)

    sizes = [1, 2, 3, 4, 5, 6]
    effort = Effort(min_rounds=2, group=3, clock=Machine(lambda model: 1e-3 * model.size * speed["now"]))
    timings = measure_built(build, sizes, Regime(), reference=10, effort=effort)
    assert set(timings) == {*sizes, 10}
    for size in sizes:
        assert timings[size].median_ms / timings[10].median_ms == pytest.approx(size / 10, rel=0.01)


def test_settled_timers_are_silent(llama: LlamaForCausalLM) -> None:
    ticks = iter(range(1000))
    effort = Effort(min_rounds=2, clock=Clock(lambda: float(next(ticks))))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        timings = measure_many({"a": llama, "b": llama}, Regime(seq_len=4), effort=effort)
    assert set(timings) == {"a", "b"}


def test_the_toy_clock_is_exact_and_runs_no_model(llama: LlamaForCausalLM, vit: ViTForImageClassification) -> None:
    with torch.device("meta"):
        models = {"llama": LlamaForCausalLM(llama.config), "again": LlamaForCausalLM(llama.config)}
    regime = Regime(mode="prefill", seq_len=8)
    found = measure_many(models, regime, effort=Effort.quick(clock=ToyClock()))
    assert found["llama"].median_ms == pytest.approx(toy_law(llama, regime))
    assert found["llama"].median_ms == pytest.approx(found["again"].median_ms)
    assert found["llama"].device_name != regime.device_name
    with pytest.raises(InvalidRegimeError, match="does not generate"):
        measure_many({"vit": vit}, regime, effort=Effort.quick(clock=ToyClock()))


def test_the_toy_clock_tells_the_same_at_any_hour(llama: LlamaForCausalLM) -> None:
    regime, effort = Regime(seq_len=8), Effort.quick(clock=ToyClock(lambda model, regime: 1 / 3))
    first, later = (measure_many({"llama": llama}, regime, effort=effort) for _ in range(2))
    assert first == later
    with pytest.raises(HawAdaError, match="above 0, got nan"):
        measure_many({"llama": llama}, regime, effort=Effort(clock=ToyClock(lambda model, regime: float("nan"))))

"""The card and the report of a slim folder, and the card of an adapter."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from conftest import (
    LM_ROW,
    ROWS,
    TOKENS,
    VISION_ROW,
    Export,
    build,
    gate,
    inputs_of,
    scattered_plan,
    state_of,
)
from huggingface_hub import ModelCard
from peft import PeftModel
from tokenizers import Tokenizer, models
from toys import once
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from hawada_peft import (
    ExportFacts,
    LatencyBudget,
    Plan,
    QualityChange,
    SearchResult,
    Shape,
    save_slim,
    slim,
    verify_slim,
)
from hawada_peft.errors import HawAdaError, IncompatibleTableError, InvalidPlanError, VerificationError
from hawada_peft.latency import LatencyTable, Regime, Timing, measure_many
from hawada_peft.search.result import Candidate
from hawada_peft.shipping import PassportLine, calibration_facts, write_card
from hawada_peft.vanilla.family import locate

SECTIONS = ["What was cut", "Latency", "Quality", "Reconstruction", "Calibration data"]
BASE_CARD = "---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\nlanguage: en\n---\n# Base\n"


@dataclass(frozen=True)
class Slimmed:
    """A base model's folder, the slim model and its plan. Tests leave them as they are."""

    base: Path
    model: PreTrainedModel
    plan: Plan


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Slimmed:
    folder = tmp_path_factory.mktemp("bases") / "my-base"
    build(LM_ROW).save_pretrained(folder)
    words = {f"w{i}": i for i in range(TOKENS["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
    (folder / "README.md").write_text(BASE_CARD)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    plan = scattered_plan(model, LM_ROW.slim)
    return Slimmed(folder, slim(model, plan), plan)


@pytest.fixture
def folder(made: Slimmed, tmp_path: Path) -> Path:
    save_slim(made.model, tmp_path / "slim")
    return tmp_path / "slim"


def report_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "hawada_report.json").read_text())


def card_in(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def sections(card: ModelCard) -> list[str]:
    return [line.removeprefix("## ") for line in card.text.splitlines() if line.startswith("## ")]


def timings(dense: float = 3.0, slim: float = 2.0, **fields: Any) -> dict[str, Timing]:
    regime = Regime(mode="prefill", batch_size=8, seq_len=64, **fields)
    versions = {"torch": "9.9", "transformers": "8.8"}
    return {
        name: Timing(ms, ms, 0.1, 0.001, True, 30, regime, "a device", versions)
        for name, ms in (("dense", dense), ("slim", slim))
    }


def table_for(dense: Shape, **fields: Any) -> LatencyTable:
    sizes = dense.sizes()
    return LatencyTable(
        regime=Regime(mode="prefill", batch_size=8, seq_len=64, **fields),
        device_name="a device",
        base_sizes={"model_type": "llama", "hidden_size": 64, "head_dim": 8, **sizes},
        versions={"torch": "9.9", "transformers": "8.8"},
        fixed_ms=1.0,
        layer_ms=1.0,
        kv_groups=(1, sizes["num_key_value_heads"]),
        heads_per_group=(1, dense.heads_per_group),
        attention_ms=((0.0, 0.5), (0.5, 1.0)),
        ffn_sizes=(8, sizes["intermediate_size"]),
        ffn_ms=(0.0, 2.0),
        interaction_ms=0.0,
        multiple=8,
        dense_ms=17.0,
        errors={"median": 0.021, "p95": 0.05},
    )


def found(plan: Plan, *, measured: bool = True, **fields: Any) -> SearchResult:
    best = Candidate(plan.shape, 5.0, 0.1, 1000, 1e6, measured_ms=6.0 if measured else None)
    return SearchResult(
        budget=LatencyBudget(speedup=1.5, batch_size=8, seq_len=64),
        best=best,
        plan=plan,
        dense_ms=9.0,
        limit_ms=6.0,
        frontier=(best,),
        measured=(best,),
        table=table_for(plan.dense, **fields),
        rounds=1,
    )


# ------------------------------------------------------------------ with save_slim


def test_every_family_gets_a_card(exported: Export, tmp_path: Path) -> None:
    save_slim(exported.slim, tmp_path / "slim", card=ExportFacts(plan=exported.plan))
    report, card = report_in(tmp_path / "slim"), card_in(tmp_path / "slim")
    sizes = exported.plan.shape.sizes()
    assert {name: report["model"][name] for name in sizes} == sizes
    assert report["model"]["parameters"] == exported.slim.num_parameters() == exported.verification.parameters
    assert report["dense"] == exported.plan.dense.sizes() | {"parameters": build(exported.row).num_parameters()}
    assert Plan.from_dict(report["plan"]) == exported.plan
    assert card.data.library_name == "transformers"
    assert f"import {report['model']['auto_class']}" in card.text
    assert f"{exported.slim.num_parameters():,} parameters" in card.text


def test_only_two_files_are_added_and_none_is_changed(made: Slimmed, folder: Path, tmp_path: Path) -> None:
    save_slim(made.model, tmp_path / "with", card=ExportFacts(plan=made.plan))
    plain, carded = (
        {file.name: file.read_bytes() for file in place.iterdir()} for place in (folder, tmp_path / "with")
    )
    assert carded.keys() - plain.keys() == {"README.md", "hawada_report.json"}
    assert {name: carded[name] for name in plain} == plain
    assert not any(b"hawada" in content for name, content in plain.items() if name.endswith("json"))


def test_the_report_states_what_verification_measured(made: Slimmed, tmp_path: Path) -> None:
    verification = save_slim(made.model, tmp_path / "slim", card=ExportFacts())
    report = report_in(tmp_path / "slim")
    assert report["verification"]["max_difference"] == verification.max_difference
    here = report["passport"][0]
    assert (here["runtime"], here["answer"]) == (f"transformers {transformers.__version__}", "yes")
    assert here["evidence"] == "run"


def test_a_failing_verification_or_card_leaves_nothing(made: Slimmed, tmp_path: Path) -> None:
    other = replace(made.plan, channels=tuple(row[:-1] for row in made.plan.channels))
    with pytest.raises(InvalidPlanError, match="pass the plan"):
        save_slim(made.model, tmp_path / "slim", card=ExportFacts(plan=other))
    wrong = torch.zeros(2, 16, TOKENS["vocab_size"])
    with pytest.raises(VerificationError):
        save_slim(made.model, tmp_path / "slim", card=ExportFacts(), reference=wrong, inputs=inputs_of(made.model))
    assert list(tmp_path.iterdir()) == []


def test_wrong_facts_are_found_before_anything_is_written(made: Slimmed, tmp_path: Path) -> None:
    class Unwritten:
        def save_pretrained(self, _: Path) -> None:
            raise AssertionError("written")

    with pytest.raises(HawAdaError, match="do not fit into JSON"):
        save_slim(made.model, tmp_path / "slim", processor=Unwritten(), card=ExportFacts(calibration={"a": object()}))


def test_base_is_where_the_model_came_from(made: Slimmed, tmp_path: Path) -> None:
    save_slim(made.model, tmp_path / "slim", card=ExportFacts())
    report, card = report_in(tmp_path / "slim"), card_in(tmp_path / "slim")
    assert report["base"]["name"] == "my-base"
    assert report["dense"]["intermediate_size"] == LM_ROW.fields["intermediate_size"]  # read from the base's folder
    assert card.data.license_name == "mine"
    assert card.data.language == "en"
    assert card.data.base_model is None  # a folder is no repository
    assert str(made.base.parent) not in (tmp_path / "slim" / "README.md").read_text()
    assert str(made.base.parent) not in (tmp_path / "slim" / "hawada_report.json").read_text()


def test_a_base_in_the_cache_gives_its_card(made: Slimmed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = tmp_path / "cache" / "models--org--base"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("abc")
    shutil.copytree(made.base, cached / "snapshots" / "abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    model = build(LM_ROW)
    model.name_or_path = "org/base"  # as from_pretrained leaves it
    save_slim(model, tmp_path / "slim", card=ExportFacts())
    card = card_in(tmp_path / "slim")
    assert (card.data.base_model, card.data.license_name) == ("org/base", "mine")


def test_a_base_that_is_gone_is_not_named(tmp_path: Path) -> None:
    model = build(LM_ROW)
    model.name_or_path = str(tmp_path / "deleted")
    save_slim(model, tmp_path / "slim", card=ExportFacts())
    assert "base" not in report_in(tmp_path / "slim")
    assert "deleted" not in (tmp_path / "slim" / "README.md").read_text()


def test_processor_from_the_base_folder(made: Slimmed, tmp_path: Path) -> None:
    save_slim(made.model, tmp_path / "slim", processor=made.base, card=ExportFacts(repo_id="me/slim"))
    original, loaded = (AutoTokenizer.from_pretrained(place) for place in (made.base, tmp_path / "slim"))
    assert loaded.get_vocab() == original.get_vocab()
    assert 'tokenizer = AutoTokenizer.from_pretrained("me/slim")' in card_in(tmp_path / "slim").text


def test_image_processor_is_in_the_example(tmp_path: Path) -> None:
    processor = transformers.ConvNextImageProcessor(size={"shortest_edge": 16})
    save_slim(build(VISION_ROW), tmp_path / "slim", processor=processor, card=ExportFacts())
    card = card_in(tmp_path / "slim")
    assert "AutoImageProcessor.from_pretrained" in card.text
    assert "AutoTokenizer" not in card.text
    assert card.data.pipeline_tag == "image-classification"


def test_the_example_runs(made: Slimmed, tmp_path: Path) -> None:
    place = tmp_path / "slim"
    save_slim(made.model, place, processor=made.base, card=ExportFacts(repo_id=str(place)))
    code = card_in(place).text.split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(code, names)
    assert torch.equal(names["model"](**inputs_of(made.model)).logits, made.model(**inputs_of(made.model)).logits)


# ------------------------------------------------------------------ write_card


def test_without_facts_there_are_no_sections_about_them(folder: Path) -> None:
    write_card(folder)
    assert not set(sections(card_in(folder))) & set(SECTIONS)
    assert set(report_in(folder)) == {"format", "versions", "model", "alignment", "passport", "files"}
    assert report_in(folder)["passport"][0]["evidence"] == "not checked"


def test_with_all_facts_there_is_every_section(made: Slimmed, folder: Path) -> None:
    checked = PassportLine("a phone", "yes", "run", "my phone, version 3")
    facts = ExportFacts(
        base="org/base",
        plan=made.plan,
        latency=timings(),
        quality=(QualityChange("perplexity", 15.123, 31.456, "64 windows of 512 tokens"),),
        reconstruction={"damping": 0.01, "layers": [1, 2]},
        calibration={"examples": 64},
        checked=(checked,),
        license="mit",
    )
    write_card(folder, facts, verify_slim(folder, reference=made.model))
    card, report = card_in(folder), report_in(folder)
    assert [name for name in sections(card) if name in SECTIONS] == SECTIONS
    assert (card.data.base_model, card.data.license) == ("org/base", "mit")
    for text in ("15.12", "31.46", "64 windows", "1.50x", "a device", "batch 8 x 64 tokens", "- damping: 0.01"):
        assert text in card.text
    assert "Kept layers: 1, 3. Dropped: 0, 2." in card.text
    assert "| a phone | yes | run | my phone, version 3 |" in card.text
    perplexity, latency = card.data.eval_results
    assert (perplexity.metric_type, perplexity.metric_value) == ("perplexity", 31.456)
    assert perplexity.dataset_name == "64 windows of 512 tokens"
    assert "dense model: 15.12" in perplexity.metric_name
    assert (latency.metric_type, latency.dataset_name, latency.task_type) == ("latency", "a device", "text-generation")
    assert "batch_size 8 seq_len 64" in latency.metric_name
    assert report["reconstruction"] == facts.reconstruction
    assert checked.to_dict() in report["passport"]


def test_no_weights_are_needed(folder: Path) -> None:
    write_card(folder)
    before = report_in(folder)
    (folder / "model.safetensors").unlink()
    write_card(folder)
    assert before["files"].pop("model.safetensors")
    assert report_in(folder) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_is_that_of_the_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    save_slim(build(LM_ROW, dtype), tmp_path / "slim", card=ExportFacts())
    assert report_in(tmp_path / "slim")["model"]["dtype"] == str(dtype).removeprefix("torch.")


def test_a_readme_of_someone_else_is_not_replaced(folder: Path) -> None:
    (folder / "README.md").write_text("---\ntags:\n- precious\n---\nmine\n")
    with pytest.raises(FileExistsError, match="move it away"):
        write_card(folder)
    assert (folder / "README.md").read_text().endswith("mine\n")
    assert not (folder / "hawada_report.json").exists()


def test_a_card_of_ours_is_renewed(folder: Path) -> None:
    write_card(folder)
    write_card(folder, ExportFacts(base="org/base"))
    assert card_in(folder).data.base_model == "org/base"


# ------------------------------------------------------------------ facts


def test_a_searched_latency_is_called_measured(made: Slimmed, folder: Path) -> None:
    write_card(folder, ExportFacts(latency=found(made.plan)))
    latency = report_in(folder)["latency"]
    assert (latency["measured"], latency["slim_ms"], latency["dense_ms"], latency["speedup"]) == (True, 6.0, 9.0, 1.5)
    assert "random weights" in card_in(folder).text
    assert card_in(folder).data.eval_results is None  # another model of these sizes was timed


@pytest.mark.parametrize("source", ["table", "search"])
def test_an_estimated_latency_is_called_an_estimate(made: Slimmed, folder: Path, source: str) -> None:
    table = table_for(made.plan.dense)
    write_card(folder, ExportFacts(latency=table if source == "table" else found(made.plan, measured=False)))
    latency = report_in(folder)["latency"]
    assert not latency["measured"]
    assert latency["slim_ms"] == (pytest.approx(table.estimate(made.plan.shape)) if source == "table" else 5.0)
    assert "estimated, not measured" in card_in(folder).text


def test_a_latency_of_other_sizes_is_refused(made: Slimmed, folder: Path) -> None:
    other = found(replace(made.plan, channels=tuple(row[:-1] for row in made.plan.channels)))
    with pytest.raises(IncompatibleTableError, match="latency of this shape"):
        write_card(folder, ExportFacts(latency=other))


def test_timings_must_be_of_both_side_by_side(folder: Path) -> None:
    with pytest.raises(IncompatibleTableError, match=r"lack \['dense'\]"):
        write_card(folder, ExportFacts(latency={"slim": timings()["slim"]}))
    mixed = {"dense": timings()["dense"], "slim": timings(dtype="bfloat16")["slim"]}
    with pytest.raises(IncompatibleTableError, match="side by side"):
        write_card(folder, ExportFacts(latency=mixed))


def test_timings_that_were_measured(made: Slimmed, folder: Path) -> None:
    dense = transformers.AutoModelForCausalLM.from_pretrained(made.base)
    regime = Regime(mode="prefill", batch_size=1, seq_len=4)
    timed = measure_many({"dense": dense, "slim": made.model}, regime, effort=once())
    write_card(folder, ExportFacts(latency=timed))
    latency = report_in(folder)["latency"]
    assert latency["slim_ms"] == timed["slim"].median_ms
    assert latency["device"] == timed["slim"].device_name
    assert latency["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize(("backend", "evidence"), [("compile", "run"), ("eager", "not checked")])
def test_a_compiled_timing_goes_into_the_passport(folder: Path, backend: str, evidence: str) -> None:
    write_card(folder, ExportFacts(latency=timings(backend=backend)))
    [line] = [line for line in report_in(folder)["passport"] if line["runtime"] == "torch.compile"]
    assert line["evidence"] == evidence


def test_reconstruction_may_be_a_dataclass(folder: Path) -> None:
    @dataclass
    class Rebuilt:
        applied: bool
        errors: dict[str, float]

    write_card(folder, ExportFacts(reconstruction=Rebuilt(True, {"0": 0.5})))
    assert report_in(folder)["reconstruction"] == {"applied": True, "errors": {"0": 0.5}}
    assert "- applied: True" in card_in(folder).text


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (ExportFacts(reconstruction=3), "dataclass or a mapping, got a int"),
        (ExportFacts(calibration={"loss": float("nan")}), "do not fit into JSON"),
        (ExportFacts(calibration={"data": object()}), "do not fit into JSON"),
        (ExportFacts(base="/no/such/folder"), "folder that exists or the id"),
    ],
)
def test_impossible_facts_are_refused_before_anything_is_written(
    folder: Path, facts: ExportFacts, message: str
) -> None:
    with pytest.raises(HawAdaError, match=message):
        write_card(folder, facts)
    assert not (folder / "README.md").exists()
    assert not (folder / "hawada_report.json").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_quality_is_a_number(value: float) -> None:
    with pytest.raises(HawAdaError, match="perplexity"):
        QualityChange("perplexity", 3.0, value, "")


def test_calibration_is_told_by_its_content() -> None:
    tokens = torch.arange(12).reshape(3, 4)
    batches = [{"input_ids": tokens[:2]}, {"input_ids": tokens[2:]}]
    facts = calibration_facts(batches)
    assert (facts["examples"], facts["batches"]) == (3, 2)
    assert calibration_facts(iter(batches)) == facts
    assert calibration_facts(batches[::-1])["sha256"] != facts["sha256"]
    assert calibration_facts([{"input_ids": tokens[:2].float()}, batches[1]])["sha256"] != facts["sha256"]
    assert calibration_facts([{"pixels": tokens[:2]}, batches[1]])["sha256"] != facts["sha256"]
    assert calibration_facts([{"input_ids": tokens[:2].bfloat16().T}])["examples"] == 4


# ------------------------------------------------------------------ adapters


def test_an_adapter_says_import_first(tmp_path: Path) -> None:
    model = gate(build(LM_ROW), task_type="CAUSAL_LM")
    model.save_pretrained(tmp_path)
    card = card_in(tmp_path)
    code = card.text.split("```python\n")[1].split("```")[0]
    assert code.startswith("import hawada_peft")
    assert "KeyError: 'HAWADA'" in card.text
    assert "No plan is applied yet" in card.text
    assert {"hawada", "transformers"} <= set(card.data.tags)  # PEFT's tags stay
    assert (card.data.library_name, card.data.pipeline_tag) == ("peft", "text-generation")


def test_an_adapters_card_is_extended_once_and_keeps_what_was_written(tmp_path: Path) -> None:
    model = gate(build(LM_ROW))
    (tmp_path / "README.md").write_text("---\nlicense: mit\ntags:\n- mine\n---\n# My gates\n\nTrained on a hill.\n")
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    card = card_in(tmp_path)
    assert card.text.count("import hawada_peft") == 1
    assert "Trained on a hill." in card.text
    assert card.text.index("# My gates") < card.text.index("## Load this adapter") < card.text.index("Trained")
    assert card.data.license == "mit"


def test_every_named_adapter_has_a_card_in_its_folder(tmp_path: Path) -> None:
    model = gate(build(LM_ROW))
    model.add_adapter("second", model.peft_config["default"])
    model.save_pretrained(tmp_path)
    for place in (tmp_path, tmp_path / "second"):
        assert "import hawada_peft" in card_in(place).text


def test_a_planned_adapter_says_so_and_loads(tmp_path: Path) -> None:
    base = build(ROWS["vit"])
    model = gate(base)
    model.apply_plan(scattered_plan(model, ROWS["vit"].slim))
    model.save_pretrained(tmp_path)
    assert "A plan is applied" in card_in(tmp_path).text
    assert locate(PeftModel.from_pretrained(build(ROWS["vit"]), tmp_path).merge_and_unload()).dense == ROWS["vit"].slim


def test_saving_an_adapter_does_not_touch_its_files(tmp_path: Path) -> None:
    model = gate(build(LM_ROW))
    before = state_of(model)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# ------------------------------------------------------------------ text from outside


BAIT = (
    "<script>alert(1)</script> <img src=x onerror=y> [here](https://evil.example) ![p](https://evil.example/p.png) "
    "https://evil.example www.evil.example a@evil.example <!-- hidden --> \n\n# A heading\n---\nlicense: stolen\n---\n"
    "| a | b |\n```python\nimport os\n```\n*stars* `ticks` ~~gone~~"
)


@pytest.mark.parametrize("renderer", ["commonmark", "gfm-like"])
def test_text_from_outside_does_nothing_in_a_card(made: Slimmed, folder: Path, renderer: str) -> None:
    parser = pytest.importorskip("markdown_it").MarkdownIt(renderer, {"html": True} | {"linkify": False})
    timed = {name: replace(timing, device_name=BAIT) for name, timing in timings().items()}
    plain, baited = (
        ExportFacts(
            base="org/base",
            plan=made.plan,
            latency={name: replace(timing, device_name=text) for name, timing in timed.items()},
            quality=(QualityChange(text, 1.0, 2.0, text),),
            reconstruction={text: text},
            calibration={text: text},
            checked=(PassportLine(text, "yes", "run", text),),
            license="mit",
            repo_id=text,
        )
        for text in ("words", BAIT)
    )
    found = []
    for facts in (plain, baited):
        write_card(folder, facts)
        card = card_in(folder)
        tokens = [token for block in parser.parse(card.text) for token in (block, *(block.children or []))]
        kinds = [token.type for token in tokens if token.type not in ("text", "softbreak", "text_special", "entity")]
        found.append([kind for kind in kinds if kind != "code_inline"])
        assert card.data.license == "mit"
    assert found[0] == found[1]
    assert not any("html" in kind or "link" in kind or "image" in kind for kind in found[1])


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"license": ["mit"]}, "license must be a string"),
        ({"repo_id": 3}, "repo_id must be a string"),
        ({"base": 3}, "base must be an id or a path"),
        ({"plan": {}}, "plan must be a Plan"),
        ({"latency": 3.0}, "latency must be"),
        ({"search": "search.json"}, "search must be"),
        ({"calibration": [1]}, "calibration must be"),
        ({"quality": [("perplexity", 1, 2)]}, "quality must be a list of QualityChange"),
        ({"quality": QualityChange("a", 1.0, 2.0, "")}, "quality must be a list"),
        ({"checked": ["ONNX"]}, "checked must be a list of PassportLine"),
    ],
    ids=str,
)
def test_facts_of_another_type_are_refused_when_they_are_given(facts: dict[str, Any], words: str) -> None:
    with pytest.raises(HawAdaError, match=words):
        ExportFacts(**facts)


@pytest.mark.parametrize(
    "card",
    [
        "---\nlicense: [\n---\n# Base\n",
        "---\n- a\n- b\n---\n",
        "---\nlicense: {a: 1}\nlanguage: 3\n---\n",
        "---\n\x00\n---",
    ],
)
def test_a_broken_card_of_the_base_is_no_obstacle(made: Slimmed, tmp_path: Path, card: str) -> None:
    shutil.copytree(made.base, tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text(card)
    save_slim(made.model, tmp_path / "slim", card=ExportFacts(base=tmp_path / "base"))
    assert report_in(tmp_path / "slim")["base"] == {"name": "base"}


def test_an_adapters_card_names_no_folder_of_its_maker(tmp_path: Path) -> None:
    build(LM_ROW).save_pretrained(tmp_path / "someone" / "teacher")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "someone" / "teacher")
    gate(model, task_type="CAUSAL_LM").save_pretrained(tmp_path / "adapter")
    assert "someone" not in (tmp_path / "adapter" / "README.md").read_text()
    assert "someone" in (tmp_path / "adapter" / "adapter_config.json").read_text()  # PEFT's, by which it loads


def test_a_license_without_a_known_base_has_a_card(tmp_path: Path) -> None:
    base = build(LM_ROW)
    small = slim(base, scattered_plan(base, LM_ROW.slim))
    save_slim(small, tmp_path / "slim", card=ExportFacts(license="mit"))
    assert "license: mit" in (tmp_path / "slim" / "README.md").read_text()


@pytest.mark.parametrize("license", ["---\nlicense: gpl\n---", "<script>", "[x](y)", "", "x" * 100])
def test_a_license_that_is_none_is_refused(license: str) -> None:
    with pytest.raises(HawAdaError, match="license must be an identifier"):
        ExportFacts(license=license)

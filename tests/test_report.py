"""The report for people: one page of what is known, and nothing that is not."""

from __future__ import annotations

import base64
import json
import shutil
import sys
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from conftest import LM_ROW, VISION_ROW, build, gate
from gate_runs import trainer_of
from PIL import Image
from toy_race import RACE, Trials, record_of
from toy_search import DENSE, Machine, ToyQuality, toy_space
from toys import toy_table

from hawada_peft import ExportFacts, LatencyBudget, Plan, QualityChange, save_slim, write_report
from hawada_peft.errors import HawAdaError
from hawada_peft.page.known import read_peers
from hawada_peft.race import run_race
from hawada_peft.search.rounds import search
from hawada_peft.training.history import HISTORY_FILE

DEPTH = {"alone": [[0, 2.0], [1, 0.01], [2, 0.3], [3, 0.2]], "order": [1, 3], "together": [0.01, 0.4]}
VOID = {"meta", "link", "br", "hr", "img", "input"}
NAME = 'a <b> & "c" $d$'
REQUESTS = ("src", "href", "xlink:href", "srcset", "action", "data", "poster")
EVERY = {
    "milliseconds",
    "frontier",
    "dropped",
    "race",
    "stages",
    "peers",
    "kept",
    "gates",
    "sizes",
    "roundings",
    "reconstruction",
    "passport",
}


@dataclass
class Page(HTMLParser):
    """What a test asks of a page: its sections, texts and links; refuses tags that do not match."""

    open: list[str] = field(default_factory=list)
    sections: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)
    text: str = ""

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self.sections.add(found["id"] or "")
        if tag == "img":
            assert found["alt"], "a picture without words"
            self.pictures.append(found["src"] or "")
        self.links += [found[name] or "" for name in REQUESTS if name in found]
        self.ids += [found["id"] or ""] if "id" in found else []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1:] == [tag], f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text += data


def read(path: Path) -> Page:
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    page.close()
    assert page.open == []
    return page


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slim folder about which all is known, in an output folder like a recipe's. Tests leave it as it is."""
    folder = tmp_path_factory.mktemp("out")
    base = folder / NAME.replace("/", "")
    build(LM_ROW).save_pretrained(base)
    options = {"shape": None, "keep_ratio": {"heads": 0.6, "ffn": 0.41, "layers": 0.5}}
    trainer = trainer_of(folder / "gates", **options)
    trainer.train()
    plan = trainer.gated.applied_plan()
    table = toy_table(DENSE, launch=0.2, arithmetic=1.0)
    found = search(
        toy_space(), table, ToyQuality(), LatencyBudget(speedup=1.5, mode="prefill", seq_len=8), Machine(table)
    )
    found = replace(found, depth=DEPTH)
    quality = QualityChange("perplexity", 15.0, 18.5, "tests")
    race = record_of(RACE)
    run_race(race, Trials())
    facts = ExportFacts(
        base=base,
        plan=plan,
        search=found,
        race=race,
        quality=[quality],
        reconstruction={"metric": "kl", "before": 1.0, "after": 0.02, "applied": True},
        losses={"recovery_start": 0.03, "recovery_end": 0.001},
    )
    save_slim(trainer.gated.merge_and_unload(), folder / "slim", card=facts)
    report = json.loads((folder / "slim" / "hawada_report.json").read_text())
    report["latency"] = {
        "measured": True, "dense_ms": 6.0, "slim_ms": 4.0, "speedup": 1.5, "regime": report["search"]["regime"],
        "device": "a <device>", "versions": {"torch": "1", "transformers": "1"}, "how": "side by side",
    }  # fmt: skip
    (folder / "slim" / "hawada_report.json").write_text(json.dumps(report))
    (folder / "peers.jsonl").write_text(json.dumps({"name": NAME, "quality": 20, "speedup": 1.4}) + "\n\n")
    return folder


@pytest.fixture(scope="module")
def page(out: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("page")
    written = write_report(out / "slim", target, training=out / "gates", peers=out / "peers.jsonl")
    assert written.to_dict() == {"page": str(written.page), "pictures": [str(path) for path in written.pictures]}
    assert {path.name for path in target.iterdir()} == {written.page.name, *(path.name for path in written.pictures)}
    return written.page


def test_all_that_is_known_is_there(page: Path) -> None:
    found = read(page)
    assert found.sections == EVERY
    assert "`" not in found.text
    assert 0 < len(found.ids) == len(set(found.ids))
    assert "2 of 4 layers" in found.text
    for words in (
        "without layers 1-2; least squares, close",
        "won",
        "beside the budget",
        "left after rung 1, ",
        "recovered",
        "4 layers in numbers",
        "18.5",
        "1.50x",
        "keep ratio",
        "slower than the budget",
        "chosen",
        "the nearest size",
    ):
        assert words in found.text


def test_nothing_is_requested_and_nothing_runs(page: Path) -> None:
    text, found = page.read_text(encoding="utf-8"), read(page)
    assert "<script" not in text
    assert "http://" not in text
    assert "https://" not in text
    assert "url(" not in text.replace("url(#", "")
    assert found.links
    assert all(link.startswith(("#", "data:")) for link in found.links)


def test_code_is_not_between_literal_backticks(page: Path) -> None:
    assert "`" not in read(page).text


def test_names_are_text(page: Path) -> None:
    text, found = page.read_text(encoding="utf-8"), read(page)
    assert "<b>" not in text
    assert "<device>" not in text
    assert found.text.count(NAME) >= 3  # title, heading, peers' table
    assert "a <device>" in found.text


def test_pictures_are_in_the_page(page: Path) -> None:
    found = read(page)
    assert len(found.pictures) == 9
    for picture in found.pictures:
        root = ElementTree.fromstring(base64.b64decode(picture.removeprefix("data:image/svg+xml;base64,")))
        assert root.tag.endswith("svg")


def test_png_files_are_pictures(page: Path) -> None:
    files = sorted(page.parent.glob("*.png"))
    assert {path.stem for path in files} == {
        "milliseconds", "frontier", "dropped", "race", "stages", "peers", "kept", "gates", "training"
    }  # fmt: skip
    for path in files:
        with Image.open(path) as picture:
            picture.load()
            assert picture.width > 600
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 10  # not blank


def test_what_is_not_known_is_not_there(tmp_path: Path) -> None:
    save_slim(build(VISION_ROW), tmp_path / "slim", card=ExportFacts())
    written = write_report(tmp_path / "slim")
    assert written.page == tmp_path / "slim-report" / "report.html"
    assert written.pictures == []
    found = read(written.page)
    assert found.sections == {"sizes", "passport", "missing"}
    assert all(words in found.text for words in ("hawada report --training", "hawada report --peers"))


def test_without_pictures_there_are_words(out: Path, tmp_path: Path) -> None:
    written = write_report(out / "slim", tmp_path, training=out / "gates", pictures=False)
    assert written.pictures == []
    assert "<img" not in written.page.read_text(encoding="utf-8")
    assert read(written.page).sections == EVERY - {"peers"} | {"missing"}


def test_a_search_of_its_own_file(out: Path, tmp_path: Path) -> None:
    report = json.loads((out / "slim" / "hawada_report.json").read_text())
    search = report.pop("search")
    (tmp_path / "slim").mkdir()
    (tmp_path / "slim" / "hawada_report.json").write_text(json.dumps(report))
    file = tmp_path / "plan.search.json"
    file.write_text(json.dumps({"format": 1} | search))
    with pytest.raises(HawAdaError, match="the search for another model"):
        write_report(tmp_path / "slim", search=file)
    search["points"][-1]["shape"] = Plan.from_dict(report["plan"]).shape.to_dict()
    file.write_text(json.dumps({"format": 1} | search))
    found = read(write_report(tmp_path / "slim", search=file, pictures=False).page)
    assert "frontier" in found.sections
    assert "frontier" not in read(write_report(tmp_path / "slim", pictures=False).page).sections
    file.write_text('{"format": 1}')
    with pytest.raises(HawAdaError, match="Pass the file that `hawada plan` leaves"):
        write_report(tmp_path / "slim", search=file)
    with pytest.raises(FileNotFoundError):
        write_report(tmp_path / "slim", search=tmp_path / "none.json")


def test_the_history_of_a_recipe_is_found(out: Path, tmp_path: Path) -> None:
    shutil.copytree(out / "slim", tmp_path / "slim")
    assert "gates" not in read(write_report(tmp_path / "slim", pictures=False).page).sections
    shutil.copy(out / "gates" / HISTORY_FILE, tmp_path)
    assert "gates" in read(write_report(tmp_path / "slim", pictures=False).page).sections


def test_a_history_of_another_model_is_not_taken(out: Path, tmp_path: Path) -> None:
    history = json.loads((out / "gates" / HISTORY_FILE).read_text())
    for entry in history["entries"]:
        entry["heads"]["keep"].append(1.0)
    (tmp_path / HISTORY_FILE).write_text(json.dumps(history))
    with pytest.raises(HawAdaError, match="another number of layers"):
        write_report(out / "slim", tmp_path / "page", training=tmp_path)


def test_bad_input_is_refused(out: Path, tmp_path: Path) -> None:
    with pytest.raises(HawAdaError, match="holds no hawada_report"):
        write_report(tmp_path)
    with pytest.raises(HawAdaError, match="holds no gate_history"):
        write_report(out / "slim", tmp_path / "page", training=tmp_path)
    (tmp_path / "hawada_report.json").write_text("{")
    with pytest.raises(HawAdaError, match="damaged"):
        write_report(tmp_path)
    (tmp_path / "hawada_report.json").write_text('{"format": 99}')
    with pytest.raises(HawAdaError, match="format"):
        write_report(tmp_path)
    assert not (tmp_path / "page").exists()


@pytest.mark.parametrize(
    "line",
    ["{", "[1]", '{"name": "a"}', '{"name": "a", "quality": 1}', '{"name": "a", "quality": 1, "speedup": 0}',
     '{"name": "a", "quality": NaN, "speedup": 2}', '{"name": "a", "quality": 1, "speedup": 2, "latency_ms": 3}',
     '{"name": "a", "quality": 1, "speedup": 2, "other": 3}'],
)  # fmt: skip
def test_what_is_no_peer_is_refused_by_its_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "peers.jsonl"
    path.write_text('{"name": "fine", "quality": 1, "speedup": 2}\n' + line)
    with pytest.raises(HawAdaError, match="line 2"):
        read_peers(path)


@pytest.mark.parametrize(("module", "pictures"), [("matplotlib", True), ("jinja2", False)])
def test_what_is_not_installed_is_named(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, pictures: bool
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(HawAdaError, match=rf"{module}.*hawada_peft\[report\]"):
        write_report(out / "slim", tmp_path / "page", pictures=pictures)
    assert not (tmp_path / "page").exists()


def test_gates_of_a_part_of_the_axes(tmp_path: Path) -> None:
    model = gate(build(LM_ROW), shuffle=False, gates=("ffn",))
    trainer = trainer_of(tmp_path / "gates", model, shape=None, keep_ratio={"ffn": 0.5})
    trainer.train()
    plan = trainer.gated.applied_plan()
    save_slim(trainer.gated.merge_and_unload(), tmp_path / "slim", card=ExportFacts(plan=plan))
    written = write_report(tmp_path / "slim")
    assert {path.stem for path in written.pictures} == {"kept", "gates", "training"}
    assert "heads, kept" not in read(written.page).text

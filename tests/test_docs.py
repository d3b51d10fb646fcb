"""The README and the docs: what they show is run, parsed or looked up, page by page."""

from __future__ import annotations

import ast
import configparser
import importlib
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from itertools import takewhile
from pathlib import Path
from textwrap import dedent
from types import ModuleType
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
import typer
import yaml
from conftest import LM_ROW, VISION_ROW, build, gate, scattered_plan
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from toys import once
from transformers import PreTrainedModel
from zoo import ZOO

import hawada_peft
from hawada_peft import ExportFacts, Family, Plan, Shape
from hawada_peft.cli import errors
from hawada_peft.cli.program import app
from hawada_peft.gates.relaxation import RELAXATIONS
from hawada_peft.latency import Regime
from hawada_peft.recipes import Recipe, steps_of
from hawada_peft.vanilla.family import FAMILIES

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
REASONS = {"needs a GPU", "needs the Hub", "needs bitsandbytes", "another library's"}
"""Why a block may be left out, said in a comment before it: `<!-- not run: needs a GPU -->`."""

FENCE = re.compile(
    r"(?:^<!-- not run: (?P<why>[^\n]*) -->\n+)?^(?P<indent> *)```(?P<language>[^\n]*)\n(?P<text>.*?)^(?P=indent)```$"
    r"(?:\n+^```text\n(?P<error>\w+(?:Error|Warning): .*?)^```$)?",
    re.DOTALL | re.MULTILINE,
)


FOLDERS = (
    "basis", "gates", "latency", "search", "distil", "surgery", "refit", "shipping", "page", "recipes", "vanilla"
)  # fmt: skip
PUBLIC = [*(importlib.import_module(f"hawada_peft.{name}") for name in FOLDERS), hawada_peft]
"""Where the names come from that pages use."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    text: str
    line: int
    why_not: str | None
    error: str | None
    """What it ends with, if a block of text after it says so; three dots stand for anything."""


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            found["language"],
            dedent(found["text"]),
            text.count("\n", 0, found.start("text")),
            found["why"],
            found["error"],
        )
        for found in FENCE.finditer(text)
    ]


def of_language(*languages: str) -> list[Any]:
    found = [(page, block) for page in PAGES for block in blocks(page) if block.language in languages]
    return [pytest.param(page, block, id=f"{page.name}:{block.line}") for page, block in found]


def lines_of_shell(program: str) -> list[Any]:
    """Lines of shell blocks that start with a program's name."""
    found = {}
    for page in PAGES:
        shell = "\n".join(block.text for block in blocks(page) if block.language in ("", "sh", "bash"))
        for line in shell.replace("\\\n", " ").splitlines():
            if line.strip().startswith(f"{program} "):
                found[f"{page.name}: {line.strip()}"] = line.strip()
    return [pytest.param(line, id=name) for name, line in found.items()]


def mentions(program: str) -> list[Any]:
    """Code in the running text that starts with a program's name."""
    found = {
        f"{page.name}: {code}": code
        for page in PAGES
        for code in re.findall(r"`([^`\n]+)`", FENCE.sub("", page.read_text(encoding="utf-8")))
        if code.startswith(f"{program} ")
    }
    return [pytest.param(code, id=name) for name, code in found.items()]


# ---------------------------------------------------------------- what blocks may use without making it

SHORTER = {
    r"(max_steps\W+)\d+": r"\g<1>3",
    r"(seq_len=)\d+": r"\g<1>16",
    r"(batch_size=)\d+": r"\g<1>2",
    r"\bspeedup=[\d.]+": "latency_ms=1000, max_parameters=100_000",  # the same search, without noise
    r"bf16=True": "bf16=False",
    r"=\[\.\.\.\]": "=[]",
}
EFFORT = once(candidates=1, search_rounds=2, cache=True)
MEASURES = {"find_plan", "measure_table", "measure_many", "HawAdaTrainer", "Race"}
"""What measures: by a toy clock, where a block names no effort."""


class Brief(ast.NodeTransformer):
    """Gives such calls the keyword `effort`."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        named = isinstance(node.func, ast.Name) and node.func.id in MEASURES
        if named and "effort" not in {keyword.arg for keyword in node.keywords}:
            node.keywords.append(ast.keyword("effort", ast.Name("EFFORT", ast.Load())))
        return ast.fix_missing_locations(node)


def shortened(code: str) -> str:
    """The block with few steps, small batches, inputs that tiny models take, and a budget that no timer decides."""
    for pattern, value in SHORTER.items():
        code = re.sub(pattern, value, code)
    return code


def rows_of_tokens() -> torch.Tensor:
    return torch.from_numpy((np.arange(64 * 16) ** 2 // 7) % LM_ROW.fields["vocab_size"]).reshape(64, 16)


def batches_of_tokens() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": rows_of_tokens()[at : at + 8]} for at in (0, 8, 16)]


def planned() -> peft.PeftModel:
    model = gate(build(LM_ROW), shuffle=False)
    model.apply_plan(model.plan(keep_ratio=0.5))
    return model


def slim_model() -> Any:
    return hawada_peft.slim(build(LM_ROW), scattered_plan(build(LM_ROW), LM_ROW.slim))


def timings() -> Any:
    dense, regime = build(LM_ROW), Regime(mode="prefill", batch_size=1, seq_len=8)
    return hawada_peft.latency.measure_many({"dense": dense, "slim": slim_model()}, regime, effort=EFFORT)


def gate_trainer() -> Any:
    args = transformers.TrainingArguments("trainer-output", learning_rate=0.05, max_steps=3, report_to=[])
    data, shape = [{"input_ids": row} for row in rows_of_tokens()], Shape(intermediate_size=48)
    return hawada_peft.HawAdaTrainer(gate(build(LM_ROW), shuffle=False), args, train_dataset=data, shape=shape)


class Blocks(nn.Module):
    """A model that is not of transformers: convolution, attention, FFN and a projection past them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 8, 1)
        self.blocks = nn.ModuleList(
            [nn.ModuleDict({"attn": self.attention(), "mlp": self.ffn(), "skip": nn.Linear(8, 8)})]
        )

    @staticmethod
    def attention() -> nn.Module:
        attention = nn.Module()
        attention.out_proj, attention.head_dim = nn.Linear(8, 8), 4
        return attention

    @staticmethod
    def ffn() -> nn.Module:
        return nn.ModuleDict({"fc1": nn.Linear(8, 16), "fc2": nn.Linear(16, 8)})


def starcoder() -> Any:
    sizes = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 4}
    config = transformers.Starcoder2Config(vocab_size=128, intermediate_size=96, **sizes)
    return transformers.Starcoder2ForCausalLM(config).eval()


Factories = dict[str, Callable[[], Any]]

ANYWHERE: Factories = {
    "base": lambda: build(LM_ROW),
    "dense": lambda: build(LM_ROW),
    "model": planned,
    "plan": lambda: scattered_plan(build(LM_ROW), LM_ROW.slim),
    "shape": lambda: Shape(intermediate_size=48),
    "args": lambda: transformers.TrainingArguments("out", learning_rate=0.05, max_steps=3, report_to=[]),
    "data": lambda: [{"input_ids": row} for row in rows_of_tokens()[8:]],
    "held_out": lambda: [{"input_ids": row} for row in rows_of_tokens()[:8]],
    "batches": batches_of_tokens,
    "calibration_batches": batches_of_tokens,
}
"""Made anew for each block that says the name, unless the page has given it another value."""


def llava() -> PreTrainedModel:
    kind = ZOO["llava"]
    return kind.model_class(kind.make_config()).eval()


BY_PAGE: dict[str, Factories] = {
    "add-a-family.md": {"tiny_model": starcoder},
    "basis.md": {
        "vit": lambda: build(VISION_ROW),
        "images": lambda: [{"pixel_values": torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(0))}],
    },
    "families.md": {"llava": llava},
    "gates-and-adapters.md": {
        "model": Blocks,
        "x": lambda: torch.ones(2, 3, 8),
        "images": lambda: torch.ones(2, 3, 4, 4),
    },
    "add-an-adapter.md": {"model": Blocks},
    "hub.md": {"slim": slim_model, "found": timings, "dense_ppl": lambda: 10.0, "slim_ppl": lambda: 11.0},
    "recovery.md": {"slim": slim_model},
    "report.md": {"slim": slim_model, "timings": timings, "trainer": gate_trainer},
}


@pytest.fixture
def relaxations() -> Iterator[None]:
    """Lets a page add relaxations: they are gone after it."""
    before = dict(RELAXATIONS)
    yield
    RELAXATIONS.clear()
    RELAXATIONS.update(before)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What blocks find in the current folder: a dense model, trained gates with a plan, tokens."""
    folder = tmp_path_factory.mktemp("docs")
    build(LM_ROW).save_pretrained(folder / "teacher")
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 128)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    (folder / "text.txt").write_text(" ".join(f"w{3 + index**2 % 125}" for index in range(5000)), encoding="utf-8")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(
        folder / "teacher"
    )
    build(LM_ROW).save_pretrained(folder / "base")
    planned().save_pretrained(folder / "adapter")
    np.save(folder / "tokens.npy", rows_of_tokens().numpy().astype(np.uint16).reshape(-1))
    hawada_peft.save_slim(slim_model(), folder / "out" / "slim", card=ExportFacts(plan=ANYWHERE["plan"]()))
    (folder / "peers.jsonl").write_text('{"name": "a peer", "quality": 34.1, "speedup": 1.5}\n', encoding="utf-8")
    return folder


TEACHERS: dict[str, dict[str, int]] = {"quickstart.md": {"intermediate_size": 1024}}
"""Other sizes of the model in the folder `teacher`, for the shapes that a page asks for."""


def runs(page: Path) -> bool:
    return any(block.language == "python" and block.why_not is None for block in blocks(page))


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
@pytest.mark.usefixtures("rows_of_families", "relaxations", "toy_machine")
@pytest.mark.parametrize("page", [page for page in PAGES if runs(page)], ids=lambda page: page.name)
def test_python_blocks_run(page: Path, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(folders, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    build(LM_ROW, **TEACHERS.get(page.name, {})).save_pretrained("teacher")
    monkeypatch.setenv("HAWADA_CACHE", str(folders / "cache"))  # the pages share their latency tables
    libraries = {name: getattr(transformers, name) for name in ("AutoModelForCausalLM", "TrainingArguments")}
    names: dict[str, Any] = {name: getattr(part, name) for part in PUBLIC for name in part.__all__} | libraries
    names |= {
        "EFFORT": EFFORT,
        "torch": torch,
        "nn": nn,
        "PeftModel": peft.PeftModel,
        "get_peft_model": peft.get_peft_model,
    }
    factories = ANYWHERE | BY_PAGE.get(page.name, {})
    for block in blocks(page):
        if block.language != "python" or block.why_not is not None:
            continue
        names |= {name: make() for name, make in factories.items() if re.search(rf"\b{name}\b", block.text)}
        parsed = Brief().visit(ast.parse("\n" * block.line + shortened(block.text), str(page)))
        given = {
            node.id for node in ast.walk(parsed) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        }
        factories = {name: make for name, make in factories.items() if name not in given}
        code = compile(parsed, str(page), "exec")
        if block.error is None:
            exec(code, names)
            continue
        with pytest.raises(Exception) as raised:  # noqa: PT011  # its type is compared with the page
            exec(code, names)
        said = " ".join(f"{raised.type.__name__}: {raised.value}".split())
        expected = ".*".join(re.escape(part.strip()) for part in " ".join(block.error.split()).split("..."))
        assert re.fullmatch(expected, said), said


def test_adapter_without_the_import_is_not_known(folders: Path) -> None:
    script = "import sys; from peft import PeftConfig; PeftConfig.from_pretrained(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", script, str(folders / "adapter")], capture_output=True, text=True)
    said = done.stderr.strip().splitlines()[-1]
    assert f"`{said}`" in (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")


def test_blocks_that_are_not_run_say_why() -> None:
    left_out = [block for page in PAGES for block in blocks(page) if block.why_not is not None]
    assert {block.why_not for block in left_out} <= REASONS
    own = [block for block in left_out if block.why_not != "another library's"]
    assert len(own) <= 4, "fewer blocks than that should need what the tests lack"
    marks = sum(page.read_text(encoding="utf-8").count("<!-- not run:") for page in PAGES)
    assert marks == len(left_out), "a mark belongs right before its block"


def test_blocks_are_of_known_languages() -> None:
    known = {"", "text", "python", "sh", "bash", "yaml", "json"}
    assert {f"{page.name}: {b.language}" for page in PAGES for b in blocks(page) if b.language not in known} == set()


# ---------------------------------------------------------------- commands, files, data


def words_of(line: str) -> list[str]:
    """A command's words; in a line of usage, with its optional parts."""
    return shlex.split(re.sub(r"[\[\]]", " ", line), comments=True)


def command(words: list[str]) -> Any:
    """The command of `hawada` that is named, as the installed CLI has it; itself for its own options."""
    program: Any = typer.main.get_command(app)
    if words[0].startswith("-"):
        return program
    found = program.commands
    assert words[0] in found, f"hawada has no command {words[0]}; it has {sorted(found)}"
    return found[words[0]]


@pytest.mark.parametrize("line", lines_of_shell("hawada") + lines_of_shell("accelerate launch -m hawada_peft.cli"))
def test_command_parses(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = words_of(line.replace("accelerate launch -m hawada_peft.cli", "hawada"))[1:]
    words = list(takewhile(lambda word: word not in {"|", "||", "&&", ">"}, words))
    for word in words[1:]:  # what must be there to be accepted
        made = tmp_path / word
        if not word.startswith("-") and not made.exists():
            made.parent.mkdir(parents=True, exist_ok=True)
            made.touch() if made.suffix in (".yaml", ".json") else made.mkdir()
    command(words).make_context(words[0], words[1:])  # raises on what it does not know, or misses


@pytest.mark.parametrize("code", mentions("hawada"))
def test_mentioned_command_exists(code: str) -> None:
    words = words_of(code)[1:]
    options = [(*each.opts, *each.secondary_opts) for each in command(words).params]
    known = {name for names in options for name in names} | {"--help"}
    assert {word for word in words if word.startswith("--")} <= known


@pytest.mark.parametrize("line", lines_of_shell("make") + mentions("make"))
def test_make_target_exists(line: str) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert words_of(line)[1] in targets


def test_extras_exist() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = set(setup["options.extras_require"])
    named = {
        extra
        for page in PAGES
        for names in re.findall(r"hawada_peft\[([\w, -]+)\]", page.read_text(encoding="utf-8"))
        for extra in re.split(r",\s*", names)
    }
    assert named
    assert named <= extras


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"\b((?:examples|benchmarks|tests)/[\w./-]+\.\w+)", text))
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text))]
    here = {page.parent / link for link in links if link and not link.startswith(("http", "mailto:"))}
    made = {ROOT / "docs" / "reference", ROOT / "docs" / "notebooks"}  # when the site is built
    missing = [str(path) for path in {ROOT / name for name in named} | here if not path.exists()]
    assert [path for path in missing if not any(str(folder) in path for folder in made)] == []


@pytest.mark.parametrize(("page", "block"), of_language("yaml"))
def test_yaml_blocks_parse(page: Path, block: Block, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(block.text, encoding="utf-8")
    if "output" in yaml.safe_load(block.text):
        assert steps_of(Recipe.read(file))


@pytest.mark.parametrize(("page", "block"), of_language("json"))
def test_json_blocks_parse(page: Path, block: Block) -> None:
    lines = block.text.splitlines()
    for text in lines if all(line[:1] + line[-1:] == "{}" for line in lines) else [block.text]:
        data = json.loads(text)
        if "channels" in data:
            assert Plan.from_dict(data).to_dict() == data


# ---------------------------------------------------------------- the site


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    """What the site takes from the code; MkDocs itself is not needed."""
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.usefixtures("rows_of_families")
def test_table_has_a_line_per_family(hooks: ModuleType) -> None:
    llama = FAMILIES["llama"]
    row = Family(
        layers="layers", attention_out=llama.attention_out, ffn_out="mlp.c_proj", kv_heads_field="num_key_value_heads"
    )
    hawada_peft.register_family("starcoder2", row)
    header, _, *lines = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in hooks.families_table().split("\n")
    ]
    cells = {line[0].strip("`"): dict(zip(header, line, strict=True)) for line in lines}
    assert list(cells) == sorted(FAMILIES)
    assert cells["starcoder2"]["hidden size"] == "no"
    assert {line["re-homes to"] for name, line in cells.items() if not FAMILIES[name].twin} == {"-"}
    assert hooks.FAMILIES_MARK in (ROOT / "docs" / "families.md").read_text(encoding="utf-8")


def test_reference_has_every_public_name_once(hooks: ModuleType) -> None:
    listed = [name for title, names in hooks.reference().items() if title not in hooks.BEYOND for name in names]
    assert [name.removeprefix("hawada_peft.") for name in listed][: len(hawada_peft.__all__)] == hawada_peft.__all__
    last = [name.rpartition(".")[2] for name in listed]
    assert len(set(last)) == len(last)


def rows(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.split("\n")[2:]]


def test_table_of_options_has_what_the_command_takes(hooks: ModuleType) -> None:
    measure, beyond, every = hooks.options_table("measure"), hooks.options_table("plan", "measure"), hooks.EVERY
    shown = [
        name
        for line in rows(hooks.options_table(every)) + rows(measure) + rows(beyond)
        for name in line[0].split(", ")
    ]
    taken = [f"`{name}`" for each in command(["plan"]).params for name in (*each.opts, *each.secondary_opts)]
    assert sorted(shown) == sorted(name for name in taken if name.startswith("`-"))
    backend = next(line for line in rows(measure) if line[0] == "`--backend`")
    assert backend[1] == "`eager`"
    assert all(f"`{choice}`" in backend[2] for choice in hawada_peft.latency.regime.BACKENDS)


def test_page_of_the_command_line_names_every_command_option_and_exit_code(hooks: ModuleType) -> None:
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    text = hooks.OPTIONS_MARK.sub(lambda found: hooks.options_table(*found.groups()), text)
    sections = dict(zip(*[iter(re.split(r"^## `hawada (\w+).*$", text, flags=re.MULTILINE)[1:])] * 2, strict=True))
    commands: dict[str, Any] = vars(typer.main.get_command(app))["commands"]
    assert sections.keys() == commands.keys()
    printing = {"json", "quiet", "debug"}
    for name, command in commands.items():
        options = [
            opt for each in command.params for opt in (*each.opts, *each.secondary_opts) if opt.startswith("--")
        ]
        section = sections[name] + (text if name in ("init", "measure", "plan", "evaluate") else "")
        assert [opt for opt in options if opt[2:] not in printing and f"`{opt}" not in section] == [], name
        assert all(f"hawada {name}" in sections[name] for _ in options)
    assert all(f"`--{name}`" in text for name in (*printing, "version"))
    assert all(f"| {code} |" in text for code in errors.EXIT_CODES)


def test_table_of_knobs_has_every_default(hooks: ModuleType) -> None:
    shown = {
        name.strip("`"): default.strip("`") for name, default, _ in rows(hooks.fields_table("GateTrainingArguments"))
    }
    added = fields(hawada_peft.GateTrainingArguments)[len(fields(transformers.TrainingArguments)) :]
    assert shown == {each.name: "" if each.default is None else str(each.default) for each in added}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_marks_are_of_commands_and_classes(page: Path, hooks: ModuleType) -> None:
    text = page.read_text(encoding="utf-8")
    made = [hooks.options_table(*found.groups()) for found in hooks.OPTIONS_MARK.finditer(text)]
    made += [hooks.fields_table(found["name"]) for found in hooks.FIELDS_MARK.finditer(text)]
    assert len(made) == text.count("<!-- options") + text.count("<!-- fields")
    assert all(rows(table) for table in made)


def test_table_of_a_recipe_has_every_section() -> None:
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    table = text[text.index("| section | what |") :].partition("\n\n")[0]
    named = {name for line in rows(table) for name in re.findall(r"`(\w+)`", line[0])}
    assert named == {each.name for each in fields(Recipe)}

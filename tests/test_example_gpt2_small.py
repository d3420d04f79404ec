from __future__ import annotations

import itertools
import json
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("psutil")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import gpt2_small
import text_data
import training_run
from gpt2_options import parse_options
from reporting import seeds_table
from rich.console import Console
from run_records import RunRecord, SeedRecord, StepRecord
from transformers import GPT2LMHeadModel

FILES = 40
STEPS = 24


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for index in range(FILES):
        lines = [f"def function_{index}_{line}(x):\n    return x * {line}\n" for line in range(30)]
        path = folder / f"package_{index % 3}" / f"module_{index}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def surroundings(cache_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_home))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def flags(text_folder: Path, output: Path, *more: str) -> list[str]:
    # One thread: several are slower here, and much slower beside other work.
    tiny = "--model tiny --device cpu --threads 1 --batch 2 --length 16 --held-out-windows 4"
    return [
        *tiny.split(),
        *("--vocabulary", "300"),
        *("--steps", str(STEPS), "--data", str(text_folder), "--output", str(output), *more),
    ]


def results(output: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((output / "results.json").read_text(encoding="utf-8"))
    return content


def test_split_is_disjoint_and_depends_on_relative_paths_only(
    text_folder: Path, tmp_path: Path
) -> None:
    corpus = text_data.load_corpus([text_folder])
    training = {document.name for document in corpus.training}
    held_out = {document.name for document in corpus.held_out}
    assert corpus.split == "by file"
    assert training
    assert held_out
    assert not training & held_out
    assert len(training | held_out) == FILES
    assert text_data.load_corpus([text_folder]) == corpus

    moved = tmp_path / "elsewhere"
    for document in (*corpus.training, *corpus.held_out):
        path = moved / document.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("other text", encoding="utf-8")
    again = text_data.load_corpus([moved])
    assert {document.name for document in again.held_out} == held_out
    assert again.digest() != corpus.digest()


def test_a_single_file_is_split_by_position(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("abcdefghij" * 100, encoding="utf-8")
    corpus = text_data.load_corpus([path])
    assert corpus.split == "by position"
    assert corpus.training[0].text + corpus.held_out[0].text == "abcdefghij" * 100
    assert len(corpus.held_out[0].text) == 100


def test_standard_library_without_tests_and_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skipped = ["site-packages/a.py", "test/b.py", "email/tests/c.py", "encodings/d.py"]
    for name in ["json/decoder.py", "os.py", "notes.txt", *skipped]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("pass\n", encoding="utf-8")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    corpus = text_data.load_corpus()
    names = {document.name for document in (*corpus.training, *corpus.held_out)}
    assert names == {"json/decoder.py", "os.py"}


def test_binary_and_hidden_files_are_left_out(tmp_path: Path) -> None:
    (tmp_path / ".hidden").write_text("no", encoding="utf-8")
    (tmp_path / "picture.bin").write_bytes(b"\x00\x01")
    (tmp_path / "note.txt").write_text("yes " * 50, encoding="utf-8")
    corpus = text_data.load_corpus([tmp_path])
    assert {document.name for document in (*corpus.training, *corpus.held_out)} == {"note.txt"}
    with pytest.raises(ValueError, match=r"picture\.bin: not a text file"):
        text_data.load_corpus([tmp_path / "picture.bin"])


def test_tokenizer_is_trained_once_and_survives_a_broken_cache(
    text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    corpus = text_data.load_corpus([text_folder])
    first = text_data.tokenize(corpus, 300)
    assert first.training.dtype == torch.int32
    assert 0 <= int(first.training.min()) < int(first.training.max()) < 300
    (cached,) = (tmp_path / "triton_hybrid").iterdir()

    with monkeypatch.context() as context:
        context.setattr(text_data, "BpeTrainer", None)  # cannot be trained again
        second = text_data.tokenize(corpus, 300)
    assert torch.equal(first.training, second.training)

    cached.write_text("{ half a file", encoding="utf-8")
    third = text_data.tokenize(corpus, 300)
    assert torch.equal(first.held_out, third.held_out)
    assert json.loads(cached.read_text(encoding="utf-8"))


def test_tokens_turn_back_into_the_text(text_folder: Path) -> None:
    corpus = text_data.load_corpus([text_folder])
    encoder = text_data.trained_tokenizer(corpus, 300)
    text = corpus.held_out[0].text + " äöü 漢字"
    assert encoder.decode(encoder.encode(text).ids) == text


def test_draws_depend_on_seed_and_number_only() -> None:
    tokens = torch.arange(1000, dtype=torch.int32)

    def draws(seed: int) -> torch.Tensor:
        sampler = text_data.WindowSampler(tokens, 3, 8, seed, torch.device("cpu"))
        return torch.stack([sampler.draw() for _ in range(5)])

    assert torch.equal(draws(1), draws(1))
    assert not torch.equal(draws(1), draws(2))
    assert (draws(1).diff(dim=-1) == 1).all()
    with pytest.raises(ValueError, match="--length 1001"):
        text_data.WindowSampler(tokens, 3, 1001, 1, torch.device("cpu"))


def test_gpt2_small_has_the_size_of_gpt2_small() -> None:
    text = text_data.TokenizedText(torch.zeros(1), torch.zeros(1), 50_257, 0, "")
    assert training_run.parameter_count(parse_options([]), text) == 124_439_808


def test_both_runs_see_the_same_batches_and_leave_results(
    text_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    samplers: list[list[torch.Tensor]] = []

    class Recorder(text_data.WindowSampler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.drawn: list[torch.Tensor] = []
            samplers.append(self.drawn)

        def draw(self) -> torch.Tensor:
            self.drawn.append(super().draw())
            return self.drawn[-1]

    monkeypatch.setattr(training_run, "WindowSampler", Recorder)
    assert gpt2_small.main(flags(text_folder, tmp_path, "--controls")) == 0

    content = results(tmp_path)
    assert content["complete"]
    (seed,) = content["seeds"]
    assert list(seed["runs"]) == ["baseline", "hybrid", "control"]
    assert {run["base"] for run in seed["runs"].values()} == {content["options"]["base"]}
    assert content["options"]["base"] == "adamw"
    hybrid, baseline, control = (seed["runs"][name] for name in ("hybrid", "baseline", "control"))
    # Each run draws from its own sampler, and once from another to warm up.
    hybrid_batches, hybrid_warm_up, baseline_batches, baseline_warm_up = samplers[:4]
    assert len(baseline_batches) == baseline["gradient_evaluations"] == STEPS
    assert len(hybrid_batches) == hybrid["gradient_evaluations"] < STEPS
    for one, other in zip(hybrid_batches, baseline_batches, strict=False):
        assert torch.equal(one, other)
    assert torch.equal(hybrid_warm_up[0], baseline_warm_up[0])
    assert len(hybrid_warm_up) == len(baseline_warm_up) == 1

    assert control["gradient_evaluations"] == hybrid["gradient_evaluations"]
    assert seed["control_source"] == "own run"
    assert hybrid["stats"]["gradient_evaluations"] == hybrid["gradient_evaluations"]
    assert baseline["stats"] is None
    for run in (hybrid, baseline, control):
        assert run["held_out_loss_start"] == baseline["held_out_loss_start"]
        assert run["training_loss_first"] == baseline["training_loss_first"]
        assert run["held_out_loss_end"] < run["held_out_loss_start"]
        assert run["memory_peak_bytes"] > 0
        assert len(run["steps"]) == run["steps_taken"] == run["planned_steps"]
    for step in hybrid["steps"]:
        assert (step["loss"] is None) == (step["phase"] == "predict")
    assert {step["phase"] for step in hybrid["steps"]} >= {"warmup", "full", "predict"}
    assert seed["speed_up_wall_clock"] == pytest.approx(baseline["seconds"] / hybrid["seconds"])
    assert content["versions"]["torch"] == torch.__version__
    assert content["options"]["hybrid"]["warmup_steps"] == 5
    assert content["data"]["split"] == "by file"
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")

    printed = capsys.readouterr().out
    for words in ("Gradient evaluations", "Held-out loss, end", "Rollbacks", "Speed-up", "Predict"):
        assert words in printed
    assert len(printed.splitlines()) < 60


def test_the_baseline_on_its_way_is_the_control(text_folder: Path, tmp_path: Path) -> None:
    outcomes = []
    for name, more in (("free", ()), ("own", ("--controls",))):
        assert gpt2_small.main(flags(text_folder, tmp_path / name, *more)) == 0
        (seed,) = results(tmp_path / name)["seeds"]
        outcomes.append(seed["runs"]["control"]["held_out_loss_end"])
    assert outcomes[0] == pytest.approx(outcomes[1], rel=1e-5)


def test_inline_uses_a_gradient_at_every_step(text_folder: Path, tmp_path: Path) -> None:
    more = ("--drive", "inline", "--only", "hybrid", "--schedule", "linear", "--precision", "bf16")
    assert gpt2_small.main(flags(text_folder, tmp_path, *more)) == 0
    (seed,) = results(tmp_path)["seeds"]
    assert list(seed["runs"]) == ["hybrid"]
    assert seed["runs"]["hybrid"]["gradient_evaluations"] == STEPS


def test_muon_is_shown_beside_muon_alone(
    text_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--base", "muon", "--muon-lr", "0.001")
    assert gpt2_small.main(flags(text_folder, tmp_path, *more)) == 0
    content = results(tmp_path)
    assert content["options"]["base"] == "muon"
    assert content["options"]["muon_learning_rate"] == 0.001
    (seed,) = content["seeds"]
    runs = seed["runs"]
    bases = {name: run["base"] for name, run in runs.items()}
    assert bases == {
        "baseline": "adamw",
        "base_alone": "muon",
        "hybrid": "muon",
        "control": "adamw",
    }
    assert all("Muon" in runs[name]["optimizer"] for name in ("base_alone", "hybrid"))

    alone, hybrid = runs["base_alone"], runs["hybrid"]
    assert alone["gradient_evaluations"] == runs["baseline"]["gradient_evaluations"] == STEPS
    assert alone["stats"]["predictor"] == "none"
    assert hybrid["gradient_evaluations"] < STEPS
    # Until something is predicted the two are the same thing, and not AdamW.
    losses = {name: [step["loss"] for step in run["steps"]] for name, run in runs.items()}
    first = losses["hybrid"].index(None)
    assert losses["base_alone"][:first] == losses["hybrid"][:first]
    assert losses["base_alone"][1:first] != losses["baseline"][1:first]

    end = hybrid["held_out_loss_end"]
    on_its_way = alone["held_out_loss_after_gradients"][str(hybrid["gradient_evaluations"])]
    for key, other in (
        ("held_out_percent_above_base_alone", alone["held_out_loss_end"]),
        ("held_out_percent_above_base_alone_as_many_gradients", on_its_way),
    ):
        assert seed[key] == pytest.approx(100 * (end / other - 1))
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    for words in ("on Muon", "Muon alone", "against Muon after", "base rule"):
        assert words in printed
    table = printed[printed.index("\nSeed 0 ") :].splitlines()
    assert max(len(line.rstrip()) for line in table if str(tmp_path) not in line) <= 80


@pytest.mark.parametrize(
    ("more", "names"),
    [
        ("--only baseline", ["baseline", "base_alone"]),
        ("--only hybrid --drive inline", ["hybrid"]),
        ("--schedule linear --precision bf16", ["baseline", "base_alone", "hybrid"]),
        (
            "--schedule linear --controls --max-predict-steps 1",
            ["baseline", "base_alone", "hybrid", "control"],
        ),
    ],
)
def test_muon_with_other_flags(
    text_folder: Path, tmp_path: Path, more: str, names: list[str]
) -> None:
    assert gpt2_small.main(flags(text_folder, tmp_path, "--base", "muon", *more.split())) == 0
    (seed,) = results(tmp_path)["seeds"]
    assert list(seed["runs"]) == names
    for run in seed["runs"].values():
        assert run["complete"]
        assert run["held_out_loss_end"] < run["held_out_loss_start"]
    # The rate of a run of all steps has not decayed yet where it would be compared.
    assert seed["held_out_percent_above_base_alone_as_many_gradients"] is None


def test_only_runs_of_hybrid_optimizer_have_a_muon_group() -> None:
    text = text_data.TokenizedText(torch.zeros(1), torch.zeros(1), 300, 0, "")
    found = {}
    for more in ("", "--base muon", "--base muon --muon-lr 0.02"):
        options = parse_options(f"--model tiny --lr 0.01 {more}".split())
        model = GPT2LMHeadModel(training_run.model_config(options, text))
        for name in ("baseline", "control", "base_alone", "hybrid"):
            groups = training_run.parameter_groups(name, model, options)
            optimizer, _ = training_run.build_optimizer(name, groups, options)
            trained = {id(param) for group in optimizer.param_groups for param in group["params"]}
            assert trained == {id(param) for param in model.parameters()}
            found[more, name] = [
                (group.get("base", "torch"), group["lr"]) for group in optimizer.param_groups
            ]
    torch_only = [("torch", 0.01)]
    for (more, name), groups in found.items():
        if name in ("baseline", "control"):
            assert groups == torch_only
        elif not more:
            assert groups == [("adamw", 0.01)]
        else:
            rate = 0.02 if "--muon-lr" in more else 0.01
            assert groups == [("muon", rate), ("adamw", 0.01)]


def test_rehearsal_leaves_the_model_alone() -> None:
    options = parse_options(["--model", "tiny", "--device", "cpu", "--base", "muon"])
    text = text_data.TokenizedText(torch.zeros(1), torch.zeros(1), 300, 0, "")
    model = GPT2LMHeadModel(training_run.model_config(options, text))
    before = [param.detach().clone() for param in model.parameters()]
    for name in ("baseline", "base_alone", "hybrid"):
        training_run.rehearse(name, model, options)
    assert all(param.grad is None for param in model.parameters())
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))


def test_interruption_leaves_what_was_done(
    text_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    counter = itertools.count()
    original = training_run.train
    saved_before: list[dict[str, Any]] = []

    def train(record: RunRecord, *arguments: Any, **keywords: Any) -> None:
        if record.name == "baseline":
            saved_before.append(results(tmp_path))

            def report(record: RunRecord) -> None:
                if next(counter) == 3:
                    raise KeyboardInterrupt

            keywords["report"] = report
        original(record, *arguments, **keywords)

    monkeypatch.setattr(gpt2_small, "train", train)
    assert gpt2_small.main(flags(text_folder, tmp_path, "--seeds", "1", "2")) == 130
    content = results(tmp_path)
    assert not content["complete"]
    (seed,) = content["seeds"]
    assert seed["runs"]["hybrid"]["complete"]
    assert saved_before[0]["seeds"][0]["runs"]["hybrid"] == seed["runs"]["hybrid"]
    assert not saved_before[0]["complete"]
    assert seed["runs"]["baseline"]["steps_taken"] == 4
    assert seed["runs"]["baseline"]["held_out_loss_end"] is None
    assert seed["speed_up_wall_clock"] is None
    assert (tmp_path / "loss.png").is_file()
    assert f"4 of {STEPS}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ("--steps 0", "'0'"),
        ("--lr nan", "'nan'"),
        ("--dropout 1", "'1'"),
        ("--model huge", "'huge'"),
        ("--model tiny --length 257", "257"),
        ("--device cuda:99", "'cuda:99'"),
        ("--warmup-steps -1", "-1"),
        ("--warmup-steps many", "'many'"),
        ("--predictor oracle", "oracle"),
        ("--seeds 1 1", "1"),
        ("--data no/such/place", "no/such/place"),
        ("--only hybrid --controls", "hybrid"),
        ("--tokenizer x --vocabulary 300", "300"),
        ("--base sgd", "'sgd'"),
        ("--base muon --muon-lr 0", "'0'"),
        ("--muon-lr 0.02", "0.02"),
    ],
)
def test_bad_flags_are_refused_by_name(
    bad: str, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refusal:
        parse_options(bad.split())
    assert refusal.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert any(flag in message for flag in bad.split() if flag.startswith("--"))
    assert named in message
    assert any(word in message for word in ("allowed", "choose from", "must be"))


def test_too_little_text_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "short.txt"
    path.write_text("too short", encoding="utf-8")
    assert gpt2_small.main(flags(path, tmp_path / "out")) == 2
    assert "--length 16" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("base", ["adamw", "muon"])
def test_seeds_table_has_a_row_for_each_seed_and_the_mean(base: str) -> None:
    records = []
    for seed, loss in ((3, 2.0), (4, 4.0)):
        step = StepRecord(step=1, phase="full", seconds=1.0, gradients=1, loss=loss)
        baseline, hybrid = (
            RunRecord(name, seed, 1, 32, steps=[step], held_out_end=loss)
            for name in ("baseline", "hybrid")
        )
        records.append(SeedRecord(seed, baseline, hybrid))
        if base == "muon":
            alone = RunRecord("base_alone", seed, 1, 32, base, steps=[step], held_out_end=2 * loss)
            records[-1].alone = alone
    console = Console(width=80)
    text = "".join(segment.text for segment in console.render(seeds_table(records)))
    assert "…" not in text
    mean = next(line for line in text.splitlines() if "mean" in line)
    assert "3.0000" in mean
    assert "1.00x" in mean
    assert ("6.0000" in mean and "-50.00 %" in mean) == (base == "muon")


def test_runs_as_a_script_from_anywhere(text_folder: Path, tmp_path: Path) -> None:
    more = ("--only", "baseline")
    arguments = flags(text_folder, Path("here"), *more)
    script = [sys.executable, gpt2_small.__file__, *arguments]
    finished = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    assert results(tmp_path / "here")["complete"]

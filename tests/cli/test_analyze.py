"""`iq-export analyze` on planted models: what is planted is reported, in words and as a page."""

from __future__ import annotations

import json
import re
import resource
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from iq_export.cli import main
from tests import planted
from tests.cli import fuzz_inputs as inputs
from tests.report.test_html import Balance

# Bytes are tokens: a full stop spikes wherever it stands.
STOP = inputs._vocabulary()["."]
SPIKY = planted.Decoder(vocab=264, spikes=(planted.Spike(1, 3, token=STOP),))
SMALL = ("--samples", "12", "--length", "64", "--quiet")
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"cat {n} sat on the mat of dog {n * n}. " for n in range(400)))
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    inputs.tokenizer(folder)
    return folder


def analyzed(folder: Path, decoder: planted.Decoder, tokenizer: Path, text: Path) -> Path:
    """The page of a planted model, with its JSON beside it."""
    model, page = planted.save(decoder, folder), folder / "out" / "page.html"
    argv = ["analyze", str(model), "--tokenizer", str(tokenizer), "--calibration", str(text),
            "-o", str(page), *SMALL]  # fmt: skip
    assert main(argv) == 0
    assert sorted(path.name for path in page.parent.iterdir()) == ["page.html", "page.json"]
    return page


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path, text: Path) -> Path:
    return analyzed(tmp_path_factory.mktemp("spiky"), SPIKY, tokenizer, text)


@pytest.fixture(scope="module")
def record(page: Path) -> dict[str, Any]:
    return dict(json.loads(page.with_suffix(".json").read_text(encoding="utf-8")))


def test_the_planted_lifecycle_is_reported(record: dict[str, Any]) -> None:
    (life,) = record["lifecycles"]
    assert (life["birth"], life["death"], life["channel"], life["templates"]) == (1, 3, 5, 1)
    assert life["replaced"] and life["residual_peak"] == pytest.approx(1000, rel=0.05)
    assert [entry["token"] for entry in life["common_tokens"]] == ["."]
    assert life["at_position_0"] < 0.2
    spike, constancy, *_ = record["findings"]
    assert "leave all others at block 1, on residual channel 5" in spike["text"]
    assert "block 3 takes it out again" in spike["text"] and "'.'" in spike["text"]
    assert "is 1 vector:" in constancy["text"] and "inserted again" in constancy["int8"]
    assert record["channels"][0]["channel"] == 5 and record["channels"][0]["lifecycles"] == [1]


def test_the_sample_marks_who_spikes(record: dict[str, Any]) -> None:
    sample = record["sample"]
    marks = [text == "." for text in sample["tokens"]]
    assert sample["lifecycle"] == [int(mark) for mark in marks] and any(marks)
    peaks = [row[marks.index(True)] for row in sample["residual_max"]]
    assert peaks[1] > 900 < peaks[2] and peaks[3] < 100


def test_ranges_lose_what_the_spike_took(record: dict[str, Any]) -> None:
    found = {(p["block"], p["place"]): p for p in record["products"]}
    assert len(found) == 16
    born = found[1, "mlp out"]
    assert born["lifecycles"] == [1] and born["absmax"] > 500 and born["absmax_without"] < 50
    assert born["int8_error"] == 1.0 and born["int8_error_without"] < 0.1
    before = found[0, "mlp in"]
    assert before["lifecycles"] == [] and before["absmax"] == before["absmax_without"]
    assert found[2, "attention in"]["products"] == [
        f"layers.2/self_attn/{kind}_proj" for kind in "qkv"
    ]


def test_attention_is_looked_at_head_by_head(record: dict[str, Any]) -> None:
    (found,) = record["attention"]
    assert [block["block"] for block in found["blocks"]] == [2, 3]
    assert found["not_understood"] == []
    for block in found["blocks"]:
        assert len(block["mass"]) == len(block["aligned"]) == 4
        assert len(block["value_ratio"]) == len(block["keys_alike"]) == 2
        assert all(0 < mass < 1 for mass in block["mass"])


def test_the_json_has_these_keys(record: dict[str, Any]) -> None:
    """Who reads it depends on them: one more is no harm, one less is another format."""
    assert record["format"] == 1
    assert set(record) == {
        "format", "model", "source_sha256", "versions", "options", "tokens", "windows", "blocks",
        "hidden", "sample", "channels", "per_block", "lifecycles", "products", "attention",
        "everyone", "scores", "in_float", "warnings", "notes", "findings", "seconds",
            "peak_rss_bytes",
    }  # fmt: skip
    keys = {name: set(record[name][0]) for name in ("channels", "products", "scores", "in_float",
                                                    "findings")}  # fmt: skip
    assert keys == {
        "channels": {"channel", "peak", "block", "position", "tokens", "lifecycles"},
        "products": {"input", "block", "place", "products", "lifecycles", "absmax",
                     "absmax_without", "typical", "int8_error", "int8_error_without"},
        "scores": {"node", "product", "score"},
        "in_float": {"node", "reason"},
        "findings": {"kind", "text", "int8", "fp8", "half"},
    }  # fmt: skip
    assert set(record["sample"]) == {
        "window", "token_ids", "tokens", "lifecycle", "residual_max", "down_max",
    }  # fmt: skip
    assert set(record["attention"][0]["blocks"][0]) == {
        "block", "mass", "aligned", "query_cosine", "value_ratio", "rows_alike",
        "rows_alike_others", "keys_alike", "keys_alike_others", "spectrum",
            "zones", "pair", "pair_share",
    }  # fmt: skip
    assert record["in_float"] == [
        {"node": "lm_head", "reason": "gives the logits: the head stays in half precision"}
    ]


def test_the_page_is_self_contained(page: Path) -> None:
    content = page.read_text(encoding="utf-8")
    balance = Balance()
    balance.feed(content.replace('<link rel="icon" href="data:,">', ""))
    assert balance.open == []
    assert not re.search(r"(src|href)=(?!\"data:,\")|https?://|<script|url\(|@import", content)
    titles = re.findall(r"<h2>(.*?)</h2>", content)
    assert titles == [
        "Findings", "Where it spikes", "Largest channels", "Birth, persistence, death",
        "Templates", "Ranges with and without sinks", "What attention does with sinks",
        "What stays in float", "Notes", "How it was made",
    ]  # fmt: skip
    assert "prefers-color-scheme: dark" in content
    assert len(content) < 5_000_000


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
@pytest.mark.skipif(
    resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY,
    reason="a browser reserves more addresses than ulimit -v may leave",
)
def test_a_browser_shows_it_without_a_request(page: Path, tmp_path: Path) -> None:
    assert shown(page, tmp_path / "page") == ([], 0)
    broken = tmp_path / "broken.html"
    more = "<script>console.error('x')</script><img src='http://localhost:9/x.png'></body>"
    broken.write_text(page.read_text(encoding="utf-8").replace("</body>", more), encoding="utf-8")
    assert shown(broken, tmp_path / "broken") == (["http://localhost:9/x.png"], 1)


def shown(page: Path, folder: Path) -> tuple[list[str], int]:
    """What a browser asks the network for to show a page, and what it says on its console."""
    folder.mkdir()
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
        "--disable-background-networking", "--disable-component-update", "--no-first-run",
        f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr",
        f"--log-net-log={folder / 'net.json'}", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.count("</svg>") >= 9
    log = (folder / "net.json").read_text(encoding="utf-8", errors="replace")
    return sorted(set(re.findall(r'"url":"([^"]*)"', log))), done.stderr.count(":CONSOLE:")


def test_no_spikes_says_so(tmp_path: Path, tokenizer: Path, text: Path) -> None:
    page = analyzed(tmp_path, planted.Decoder(vocab=264, spikes=()), tokenizer, text)
    record = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    assert record["lifecycles"] == record["attention"] == []
    calm, ranges, _ = record["findings"]
    assert calm["kind"] == "calm" and "No token spikes" in calm["text"]
    assert "0 of 16 inputs" in ranges["text"] and "without" not in ranges["int8"]
    assert "None: no token leaves the others." in page.read_text(encoding="utf-8")


def test_json_on_stdout_and_a_work_folder_that_is_used_again(
    tmp_path: Path, tokenizer: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, work = planted.save(SPIKY, tmp_path), tmp_path / "work"
    argv = ["analyze", str(model), "--tokenizer", str(tokenizer), "--calibration", str(text),
            "--work", str(work), *SMALL]  # fmt: skip
    assert main([*argv, "--json", "-o", str(tmp_path / "a.html")]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["page"] == str(tmp_path / "a.html")
    assert printed["findings"] == json.loads((tmp_path / "a.json").read_text())["findings"]
    traced = (work / "traced" / "trace.json").stat().st_mtime_ns
    assert main([*argv, "-o", str(tmp_path / "b.html")]) == 0
    assert "- Lifecycle 1" in capsys.readouterr().out
    assert (work / "traced" / "trace.json").stat().st_mtime_ns == traced


def refused(capsys: pytest.CaptureFixture[str], folder: Path, *argv: str) -> tuple[int, str]:
    """Exit code and the sentence of a run that must leave nothing."""
    before = sorted(folder.rglob("*"))
    code = main(["analyze", *argv, "--quiet"])
    assert sorted(folder.rglob("*")) == before
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("iq-export: error: ")
    return code, line


def test_errors_are_one_sentence(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"no protobuf")
    (tmp_path / "there.html").touch()
    (tmp_path / "beside.json").touch()
    bad, model = str(tmp_path / "bad.onnx"), str(planted.save(SPIKY, tmp_path))
    words = ("--tokenizer", str(tokenizer))
    new, cases = str(tmp_path / "new.html"), []
    cases.append(((bad, *words, "-o", new), 3, "not an ONNX file"))
    cases.append(((str(tmp_path / "none"), "-o", new), 3, "none"))
    cases.append(((model, *words, "-o", str(tmp_path / "there.html")), 7, "there.html exists"))
    cases.append(((model, *words, "-o", str(tmp_path / "beside.html")), 7, "beside.json exists"))
    cases.append(((model, *words, "-o", str(tmp_path / "page")), 2, "does not end in .html"))
    cases.append(((model, *words, "-o", f"{bad}/page.html"), 7, "cannot write in"))
    cases.append(((model, *words, "-o", new, "--calibration", "no.txt"), 4, "does not exist"))
    cases.append(((model, *words, "-o", new, "--length", "500"), 2, "--length 128 or less"))
    for argv, code, says in cases:
        found, error = refused(capsys, tmp_path, *argv)
        assert (found, says in error) == (code, True), error


def test_a_page_that_cannot_be_written_leaves_no_json(
    tmp_path: Path,
    tokenizer: Path,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from iq_export import analyze

    model, write = planted.save(SPIKY, tmp_path), analyze.write_atomically

    def full(path: Path, content: str) -> None:
        if path.suffix == ".html":
            raise OSError(28, "No space left on device", str(path))
        write(path, content)

    monkeypatch.setattr(analyze, "write_atomically", full)
    argv = (str(model), "--tokenizer", str(tokenizer), "--calibration", str(text), "-o",
            str(tmp_path / "page.html"), *SMALL[:4])  # fmt: skip
    code, error = refused(capsys, tmp_path, *argv)
    assert (code, "the disk is full" in error) == (7, True), error

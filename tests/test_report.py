"""The report: whole, self-contained, its numbers the folder's own, and silent in a real browser."""

import base64
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sources import SMALL, write_source

from codequant import pipeline
from codequant.errors import InputError
from codequant.packing import pack, round_codebook
from codequant.report import charts, errors_by_kind, kind_of, read_evaluation, weight_density, write_report
from codequant.units import outliers

EVALUATION = {
    "tokens": 60,
    "perplexity": 67.5,
    "reference_perplexity": 66.0,
    "kl": 0.0123,
    "router_change": 0.25,
    "layers": [{"layer": i, "error": 0.01 * (i + 1), "router_change": (None, 0.2, 0.3)[i]} for i in range(3)],
}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page(HTMLParser):
    """What the tests ask of a page: ids, addresses, drawings and embedded data."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.paths: list[str] = []
        self.data = ""
        self._in_data = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids += [found["id"]] if found.get("id") else []
        self.addresses += [v for k, v in attrs if k in ("src", "href", "srcset", "action", "xlink:href") and v]
        self.paths += [found["d"]] if tag == "path" and found.get("d") else []
        self._in_data = found.get("type") == "application/json"

    def handle_data(self, data: str) -> None:
        if self._in_data:
            self.data += data

    def handle_endtag(self, tag: str) -> None:
        self._in_data = False


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized model with a dense first layer."""
    root = tmp_path_factory.mktemp("report")
    source = write_source("qwen3_moe", root / "source")
    return pipeline.quantize(source, root / "out", overrides=SMALL, calibration=root / "text.txt")


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return Page(write_report(folder, EVALUATION).read_text())


def test_every_section_is_there_and_nothing_comes_from_elsewhere(folder: Path, page: Page) -> None:
    sections = {"summary", "activations", "layers", "experts", "router", "weights", "time", "inside"}
    assert sections <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert page.addresses == ["data:,"]  # the icon, which a browser would ask the server for
    text = (folder / "report.html").read_text()
    assert not re.search(r"https?:|//[a-z]|@import|url\(", text.replace("// ", ""))
    for number in ("67.500", "+2.27% against 66.000", "0.0123", "25.0%"):  # what the evaluation says
        assert number in text


def test_drawings_hold_finite_numbers_inside_their_frames(page: Page) -> None:
    assert len(page.paths) > 20
    for path in page.paths:
        assert re.fullmatch(r"[MLHVhvz0-9. -]+", path), path
        for x, y in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", path):
            assert 0 <= float(x) <= charts.WIDTH and 0 <= float(y) <= 400, path


def test_surfaces_are_the_sampled_activations(folder: Path, page: Page) -> None:
    data = json.loads(page.data)
    stored = load_file(folder / "rotation.safetensors")
    T, C = data["shape"]["tokens"], data["shape"]["channels"]
    assert len(data["sites"]) == len(stored["activations"]) == 6  # two norms in each of three layers
    for k, site in enumerate(data["sites"]):
        for which, name in (("before", "activations"), ("after", "activations.rotated")):
            drawn = torch.frombuffer(bytearray(base64.b64decode(site[which])), dtype=torch.uint8).view(T, C)
            error = (drawn / 255 * site["peak"] - stored[name][k]).abs().max()
            # half a level, and the four digits of the peak
            assert error <= site["peak"] * (0.5 / 255 + 1e-3)
    assert [site["name"] for site in data["sites"]][:2] == [
        "layer 0, input_layernorm",
        "layer 0, post_attention_layernorm",
    ]


def test_without_evaluation_and_measured_files(folder: Path, tmp_path: Path) -> None:
    bare = Path(shutil.copytree(folder, tmp_path / "bare"))
    (bare / "timings.json").unlink()
    (bare / "rotation.safetensors").unlink()
    text = write_report(bare).read_text()
    assert "perplexity" not in text.split('id="activations"')[0]
    for remark in ("carries no timings", "was not rotated, or", "is known after"):
        assert remark in text
    (bare / "codequant.json").unlink()
    with pytest.raises(InputError, match=r"no codequant\.json"):
        write_report(bare)


def test_names_in_the_folder_cannot_inject_markup(folder: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(folder, tmp_path / "copied"))
    provenance = json.loads((copied / "codequant.json").read_text())
    provenance["source"]["name"] = "<script>alert(1)</script>"
    provenance["layers"]["0"]["errors"]["model.layers.0.<b>.q_proj"] = 9.0
    (copied / "codequant.json").write_text(json.dumps(provenance))
    text = write_report(copied).read_text()
    assert "<script>alert" not in text and "<b>.q_proj" not in text and "&lt;b&gt;.q_proj" in text


def test_a_failing_report_does_not_fail_the_run(tmp_path: Path, monkeypatch, caplog) -> None:
    def fail(folder: Path) -> Path:
        raise RuntimeError("ink is out")

    monkeypatch.setattr(pipeline, "write_report", fail)
    source = write_source("mixtral", tmp_path / "source")
    out = pipeline.quantize(
        source, tmp_path / "out", overrides=[*SMALL, "weights.method=rtn"], calibration=tmp_path / "text.txt"
    )
    assert (out / "config.json").is_file() and not (out / "report.html").exists()
    assert "no report (ink is out)" in caplog.text


@pytest.mark.parametrize("content", ["{", "[]", '{"perplexity": 2.0}', None])
def test_a_bad_evaluation_is_refused_by_name(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "numbers.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=r"numbers\.json: .*, expected what `evaluate --json` wrote"):
        read_evaluation(path)


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        ("model.layers.3.mlp.experts.7.up_proj", ("experts up_proj", 7)),
        ("model.layers.3.mlp.experts.gate_up_proj.12", ("experts gate_up_proj", 12)),
        ("model.layers.31.block_sparse_moe.experts.0.w2", ("experts w2", 0)),
        ("model.layers.3.self_attn.o_proj", ("self_attn.o_proj", None)),
        ("model.layers.3.mlp.shared_experts.down_proj", ("mlp.shared_experts.down_proj", None)),
    ],
)
def test_kinds(module: str, kind: tuple[str, int | None]) -> None:
    assert kind_of(module) == kind


def test_matrices_that_share_an_error_are_one_kind() -> None:
    prefix = "model.layers.0.mlp.experts"
    layer = {
        "errors": {f"{prefix}.{e}.{m}": (0.04 if m == "down" else 0.01) for e in (0, 1) for m in ("gate", "up", "down")}
    }
    assert errors_by_kind([layer]) == {
        "experts down": [{0: pytest.approx(0.2), 1: pytest.approx(0.2)}],
        "experts gate, up": [{0: pytest.approx(0.1), 1: pytest.approx(0.1)}],
    }


def test_weight_density_is_that_of_the_weights() -> None:
    """Normal weights, rows of different size: the density that codes give back is the normal one."""
    O, I, K = 64, 4096, 16
    weight = torch.randn(O, I, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, O)[:, None]
    levels = torch.linspace(-2.4, 2.4, K).expand(O, 1, K) * torch.logspace(-2, 2, O)[:, None, None]
    codebook, step = round_codebook(levels)
    table = (codebook.float() * step.float()[..., None]).squeeze(1)
    indices = (weight[:, :, None] - table[:, None, :]).abs().argmin(-1).to(torch.uint8)
    x, heights, means = weight_density(pack(indices, codebook, step))
    width = x[1] - x[0]
    assert sum(heights) * width == pytest.approx(1, abs=0.02)
    pitch = means[1] - means[0]
    for at, height in zip(x, heights):
        if (
            abs(at) < 1.8
        ):  # a cell's mean differs from the density at its border by slope * pitch / 2, at most 0.25 * pitch / 2
            assert height == pytest.approx(math.exp(-at * at / 2) / math.sqrt(2 * math.pi), abs=0.25 * pitch / 2 + 0.02)
    assert means == sorted(means) and len(means) == K


def test_outlier_summaries() -> None:
    x = torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    x[:, 17] += 50
    drawn = outliers.surface(outliers.few(x))
    assert drawn.shape == (outliers.TOKENS, outliers.CHANNELS)
    rows = x[:: 200 // outliers.TOKENS][: outliers.TOKENS]
    assert torch.equal(drawn.amax(1), rows.abs().amax(1).half())  # binning loses no peak
    swap = torch.eye(300).roll(1, 0)
    found = outliers.ranges(x, swap)
    assert (
        found["range"] == found["range_rotated"] == pytest.approx(float((x.amax(1) - x.amin(1)).square().mean().sqrt()))
    )
    assert outliers.spread(3) == [0, 1, 2]
    chosen = outliers.spread(96)
    assert len(set(chosen)) == outliers.SURFACES and (chosen[0], chosen[-1]) == (0, 95)


def test_ticks_reach_the_data() -> None:
    for high in (1e-9, 0.0123, 0.3, 1.0, 7.0, 99.9, 12345.0):
        ticks = charts.linear_ticks(high)
        assert ticks[0] == 0 and ticks[-2] < high <= ticks[-1] * (1 + 1e-9) and 3 <= len(ticks) <= 7


def browse(page: Path, profile: Path) -> tuple[list[str], list[str]]:
    """(console messages, addresses beyond the page itself that were asked for) of a page in headless Chromium."""
    log = profile.with_suffix(".netlog")
    quiet = ("background-networking", "component-update", "sync", "quic", "gpu", "default-apps", "extensions")
    command = [
        *(CHROMIUM, "--headless", "--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in quiet)),
        *(
            f"--user-data-dir={profile}",
            f"--log-net-log={log}",
            "--enable-logging=stderr",
            "--virtual-time-budget=2000",
        ),
        *("--dump-dom", page.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    asked = set(re.findall(r'"url":"([^"]+)"', log.read_text()))
    own = [a for a in asked if a.startswith("http") and not re.search(r"//[\w.]*google(apis)?\.com", a)]
    return console, own


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_in_a_browser(folder: Path, page: Page, tmp_path: Path) -> None:
    assert browse(folder / "report.html", tmp_path / "profile") == ([], [])
    bad = tmp_path / "bad.html"  # what the check would see if there were something
    bad.write_text("<img src='http://127.0.0.1:9/x.png'><script>undefined.y</script>")
    console, asked = browse(bad, tmp_path / "other")
    assert any("Uncaught TypeError" in line for line in console) and asked == ["http://127.0.0.1:9/x.png"]

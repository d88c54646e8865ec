"""ONNX files: they answer as torch does for any batch, say what they are, and are not written where they would not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import unperturb
from unperturb import cli
from unperturb.classifiers import create_classifier, save_classifier, wrap
from unperturb.data import Splits
from unperturb.defenses import Defense, Protected, create_defense, save_defense
from unperturb.export import OPSET, ExportError, export_named, export_onnx
from unperturb.runs import digest_of

ROOT = Path(__file__).resolve().parent.parent
IMAGES = torch.rand(9, 1, 8, 8, generator=torch.Generator().manual_seed(1))
runner = CliRunner()


@pytest.mark.parametrize("library", ["onnx", "onnxruntime"])
def test_without_the_extra_a_sentence(library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)  # what an import of it meets where it is not installed
    with pytest.raises(ImportError, match=rf"by {library}, which is not installed: pip install 'unperturb\[onnx\]'"):
        export_onnx(create_defense("identity"), tmp_path / "net.onnx", IMAGES)


@pytest.fixture
def runtime() -> Any:
    pytest.importorskip("onnx", reason="onnx is not installed (pip install 'unperturb[onnx]')")
    return pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (pip install 'unperturb[onnx]')")


def answers(runtime: Any, path: Path, images: Tensor) -> Tensor:
    """By onnxruntime alone: nothing of ours runs the file."""
    return torch.from_numpy(runtime.InferenceSession(str(path)).run(None, {"images": images.numpy()})[0])


def metadata(runtime: Any, path: Path) -> dict[str, str]:
    return dict(runtime.InferenceSession(str(path)).get_modelmeta().custom_metadata_map)


def classifier(size: int = 8) -> nn.Module:
    torch.manual_seed(0)
    made = create_classifier("convnet", channels=1, size=size, classes=4, mean=[0.3], std=[0.4]).eval()
    for tensor in made.net.state_dict().values():  # batch norms that do something
        if tensor.is_floating_point():
            tensor.add_(0.1 * torch.rand_like(tensor))
    return made


def purifier() -> Defense:
    torch.manual_seed(0)
    generator = {"name": "unet", "width": 4, "scales": 2, "gate": True}
    defense = create_defense("paired_gan", channels=1, generator=generator).eval()
    for tensor in defense.state_dict().values():
        tensor.add_(torch.randn_like(tensor) * 0.05)
    return defense


def test_a_protected_model_end_to_end(runtime: Any, tmp_path: Path) -> None:
    model, path = Protected(classifier(), purifier()), tmp_path / "new" / "net.onnx"
    done = export_onnx(model, path, IMAGES, name="mine")
    for count in (1, 2, 5, 9):
        with torch.no_grad():
            expected = model(IMAGES[:count])
        found = answers(runtime, path, IMAGES[:count])
        assert found.shape == (count, 4)
        assert float((found - expected).abs().max()) <= max(done.difference, 1e-6) * 2
    told = metadata(runtime, path)
    assert told.pop("parity") == json.dumps(
        {"images": "9 given images", "largest_difference": done.difference, "same_class": 1.0}
    )
    assert told == {
        "name": "mine",
        "kind": "protected",
        "precision": "float32",
        "opset": str(OPSET),
        "input_range": "[0, 1]",
        "input_shape": '["N", 1, 8, 8]',
        "classes": "4",
        "sha256": digest_of(model.state_dict()),
    }
    import onnx

    assert {o.version for o in onnx.load(path).opset_import if not o.domain} == {OPSET}
    assert (done.kind, done.same_class, done.bytes) == ("protected", 1.0, path.stat().st_size)
    assert done.difference < 1e-4
    assert list(path.parent.iterdir()) == [path]  # nothing half written beside it
    assert f"opset {OPSET}" in str(done)
    assert "differs from torch by at most" in str(done)


def test_a_file_that_was_exported_is_a_classifier_again(runtime: Any, tmp_path: Path) -> None:
    model = Protected(classifier(), purifier())
    export_onnx(model, tmp_path / "net.onnx", IMAGES)
    again = wrap(tmp_path / "net.onnx", size=8, channels=1, classes=4)
    torch.testing.assert_close(again(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-4)


def test_a_purifier_alone_and_odd_sides(runtime: Any, tmp_path: Path) -> None:
    images = torch.rand(5, 1, 9, 11, generator=torch.Generator().manual_seed(2))
    defense = purifier()
    done = export_onnx(defense, tmp_path / "net.onnx", images)
    found = answers(runtime, tmp_path / "net.onnx", images)
    torch.testing.assert_close(found, defense(images), rtol=0, atol=1e-5)
    assert float((found - images).abs().max()) > 0.05  # it does something
    assert (done.kind, done.same_class) == ("purifier", None)
    assert metadata(runtime, tmp_path / "net.onnx")["classes"] == ""


FILTERS = ["identity", "bit_depth", "gaussian_blur", "median", "total_variation"]


@pytest.mark.parametrize("name", FILTERS)
def test_filters(name: str, runtime: Any, tmp_path: Path) -> None:
    options = {"total_variation": {"steps": 3}}.get(name, {})
    defense = create_defense(name, **options).eval()
    export_onnx(defense, tmp_path / "net.onnx", IMAGES)
    torch.testing.assert_close(answers(runtime, tmp_path / "net.onnx", IMAGES), defense(IMAGES), rtol=0, atol=1e-5)


class Forgetful(nn.Module):
    """What a trace keeps is the branch that the first images took."""

    def forward(self, images: Tensor) -> Tensor:
        x = images.flatten(1)
        return x[:, :3] if len(images) == 2 else x[:, :3] * 1.01


class Flipped(Defense):
    """Leaves torch."""

    def purify(self, images: Tensor) -> Tensor:
        return torch.from_numpy(np.flip(images.detach().numpy(), -1).copy())


class Fourier(Defense):
    def purify(self, images: Tensor) -> Tensor:
        return torch.linalg.svdvals(images)[..., None].expand_as(images)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (Forgetful(), r"was not written: on 9 given images it differs from torch by 0\.0\d+, more than 0\.0001; Forg"),
        (Flipped(), r"was not written: its answers would not depend on the images"),
        (Fourier(), r"Fourier cannot be written as ONNX.*torch's exporter said: .*svd"),
        (create_defense("jpeg"), "was not written: its answers would not depend on the images"),
        (create_defense("denoised_smoothing", channels=1), "denoised_smoothing draws at random in each call"),
        (
            create_defense("defense_gan", channels=1, size=8, width=2, latent=3, steps=2, restarts=1),
            "defense_gan cannot be written as ONNX, which holds a fixed sequence of tensor operations",
        ),
        (
            create_defense("pipeline", parts=[{"name": "median"}, {"name": "denoised_smoothing", "channels": 1}]),
            "pipeline draws at random",
        ),
    ],
)
def test_what_no_file_can_say_is_refused_and_nothing_written(
    model: nn.Module, said: str, runtime: Any, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=said):
        export_onnx(model.eval(), tmp_path / "net.onnx", IMAGES)
    assert list(tmp_path.iterdir()) == []


def test_what_stood_there_stays_where_the_new_one_is_refused(runtime: Any, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(b"before")
    with pytest.raises(ExportError):
        export_onnx(Forgetful(), path, IMAGES)
    assert path.read_bytes() == b"before"
    export_onnx(Forgetful(), path, IMAGES, tolerance=0.02)
    assert path.read_bytes() != b"before"


def test_a_missing_operator_prints_no_graph(runtime: Any, tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from test_export import *\n"
        "try: export_onnx(Fourier().eval(), 'net.onnx', IMAGES)\n"
        "except ExportError: print('refused')"
    )
    words = [sys.executable, "-c", code, str(Path(__file__).parent)]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout == "refused\n"


def test_images_and_names_that_do_not_fit(runtime: Any, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"net.pt is to be an ONNX file: give it a name that ends in .onnx"):
        export_onnx(classifier(), tmp_path / "net.pt")
    with pytest.raises(ExportError, match="paired_gan takes images of any size: pass some"):
        export_onnx(purifier(), tmp_path / "net.onnx")
    with pytest.raises(ExportError, match="no image to compare"):
        export_onnx(classifier(), tmp_path / "net.onnx", IMAGES[:0])
    with pytest.raises(ValueError, match=r"images must lie in \[0, 1\]"):
        export_onnx(classifier(), tmp_path / "net.onnx", IMAGES * 255)
    with pytest.raises(ExportError, match="takes a Protected, a purifier or a classifier, not function"):
        export_onnx(answers, tmp_path / "net.onnx")  # type: ignore[arg-type]
    done = export_onnx(classifier(), tmp_path / "net.onnx")
    assert done.checked_on == "16 random images"
    with pytest.raises(ExportError, match="is an ONNX file already: export the purifier alone"):
        export_onnx(Protected(wrap(tmp_path / "net.onnx"), purifier()), tmp_path / "two.onnx", IMAGES)


def test_the_model_stays_as_it_is(runtime: Any, tmp_path: Path) -> None:
    net = classifier().train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    export_onnx(net, tmp_path / "net.onnx")
    assert net.training
    assert all(p.requires_grad for p in net.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


# 8 bits -------------------------------------------------------------------------------------------------------------


def test_int8_is_smaller_and_says_what_it_changes(runtime: Any, tmp_path: Path, tiny_digits: Splits) -> None:
    model = Protected(wide(), create_defense("identity"))
    data = tiny_digits.test.take(torch.arange(40))
    plain = export_onnx(model, tmp_path / "plain.onnx", data)
    small = export_onnx(model, tmp_path / "int8.onnx", data, int8=tiny_digits.train.subset(64))
    assert small.bytes < 0.5 * plain.bytes
    assert small.sha256 == plain.sha256
    images, _ = data.batch(torch.arange(40))
    with torch.no_grad():
        expected = model(images)
    for path, done in ((tmp_path / "plain.onnx", plain), (tmp_path / "int8.onnx", small)):
        found = answers(runtime, path, images)
        assert float((found - expected).abs().max()) == pytest.approx(done.difference, abs=1e-5)
        assert float((found.argmax(1) == expected.argmax(1)).float().mean()) == pytest.approx(done.same_class)
    assert 100 * plain.difference < small.difference < 0.1 * float(expected.abs().max())
    told = metadata(runtime, tmp_path / "int8.onnx")
    assert told["precision"] == "int8"
    assert json.loads(told["parity"])["largest_difference"] == small.difference
    assert "40 images of digits test" in str(small)
    import onnx

    kinds = {i.data_type for i in onnx.load(tmp_path / "int8.onnx").graph.initializer}
    assert onnx.TensorProto.INT8 in kinds


def wide() -> nn.Module:
    torch.manual_seed(0)
    return create_classifier("convnet", channels=1, size=8, classes=10, mean=[0.3], std=[0.4]).eval()


def test_int8_needs_images(runtime: Any, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="int8 reads its ranges off images"):
        export_onnx(classifier(), tmp_path / "net.onnx", IMAGES, int8=IMAGES[:0])


# By name ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    save_classifier(tmp_path / "net", wide(), {"dataset": "digits"})  # type: ignore[arg-type]
    save_defense(tmp_path / "gan", purifier(), {"dataset": "gone"})
    return tmp_path


def test_the_verb(runtime: Any, folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folders)
    words = ["export", "gan", "--classifier", "net", "--data", "digits", "--size", "8", "--n", "7", "--out", "a.onnx"]
    done = runner.invoke(cli.app, words)
    assert done.exit_code == 0, (done.output, done.exception)
    assert "a.onnx: protected, float32, opset 17" in done.output
    assert "7 images of digits test" in done.output
    assert metadata(runtime, Path("a.onnx"))["name"] == "gan before net"
    done = runner.invoke(cli.app, ["export", "median", "--data", "digits", "--size", "8", "--int8", "--out", "b.onnx"])
    assert done.exit_code == 0, (done.output, done.exception)


def test_by_name_it_is_compared_on_the_data_that_it_was_trained_on(
    runtime: Any, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert export_named(str(folders / "net"), folders / "a.onnx", size=8, n=5).checked_on == "5 images of digits test"
    save_classifier(folders / "net", wide(), {"dataset": "gone"})  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="compared on random images, as gone is not here: "):
        done = export_named(str(folders / "net"), folders / "b.onnx")
    assert done.checked_on == "16 random images"
    with pytest.raises(ValueError, match="gone"):
        export_named(str(folders / "net"), folders / "c.onnx", int8=True)
    monkeypatch.chdir(folders)
    Path("mine.py").write_text("from torch import nn\nnet = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))\n")
    with pytest.raises(ExportError, match="name their data set with --data"):
        export_named("mine.py:net", folders / "d.onnx", int8=True)
    assert export_named("mine.py:net", folders / "d.onnx", data="digits", size=8).kind == "classifier"


def test_names_that_are_none(runtime: Any, folders: Path) -> None:
    with pytest.raises(ExportError, match="net is a classifier; the purifier comes first"):
        export_named(str(folders / "net"), folders / "a.onnx", classifier=str(folders / "gan"))
    with pytest.raises(unperturb.runs.RunError, match="no defense is called 'medien'; did you mean 'median'"):
        export_named("medien", folders / "a.onnx")
    (folders / "net" / "model.safetensors").write_bytes(b"")
    with pytest.raises(unperturb.runs.RunError, match="truncated or not a safetensors file"):
        export_named(str(folders / "net"), folders / "a.onnx")


@pytest.mark.slow
def test_the_benchmark_runs(runtime: Any, tmp_path: Path) -> None:
    out = tmp_path / "export.json"
    words = [sys.executable, ROOT / "benchmarks" / "export.py", "--n", "4", "--steps", "1", "--calibration", "8"]
    few = ["--repeat", "1", "--purifiers", "zoo:protect-mnist", "--data", "digits", "--out", out]
    done = subprocess.run([*words, *few], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = {(r["system"], r["run_by"]): r for r in json.loads(out.read_text())["rows"]}
    assert len(rows) == 8
    for (system, run_by), row in rows.items():
        assert set(row["accuracy"]) == {"clean", "oblivious", "adaptive"}
        assert row["time"]["1"]["median"] > 0
        assert run_by != "ONNX float32" or row["changed"] == 0
        assert run_by != "ONNX int8 static" or row["bytes"] < 0.5 * rows[system, "torch float32"]["bytes"]

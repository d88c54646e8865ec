"""What exporting costs and changes: size, time and accuracy of torch, ONNX float32 and ONNX int8, on the same images.

    python benchmarks/export.py                      # zoo:protect-mnist and zoo:finetune-mnist before zoo:mnist-resnet8
    python benchmarks/export.py --n 8 --steps 2      # does it run?

Adversarial images are PGD's, made once on torch's float32 models and shown to each file: oblivious on the bare
classifier, adaptive through purifier and classifier. Times are of one thread's own clock, by turns, as a ratio to the
bare classifier in torch in the same run. Of int8, static is what `export_onnx(int8=...)` writes; dynamic is
onnxruntime's other way, which reads its ranges off each batch.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import unperturb as up
from unperturb.classifiers.onnx_file import OnnxModel
from unperturb.export import export_onnx
from unperturb.runs import environment, write_json

HERE = Path(__file__).resolve().parent
BATCHES = (1, 64)
KINDS = ("clean", "oblivious", "adaptive")
Model = Callable[[Tensor], Any]


def files(model: nn.Module, shown: Any, training: Any, folder: Path) -> dict[str, tuple[Model, int]]:
    """By name: (what answers images, bytes of its file or of its weights)."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    plain, static, dynamic = (folder / f"{name}.onnx" for name in ("plain", "static", "dynamic"))
    whole = export_onnx(model, plain, shown)
    small = export_onnx(model, static, shown, int8=training)
    print(f"{whole}\n{small}", flush=True)
    # Convolutions by integers take unsigned weights only here.
    quantize_dynamic(plain, dynamic, op_types_to_quantize=["Conv", "Gemm", "MatMul"], weight_type=QuantType.QUInt8)
    weights = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    found: dict[str, tuple[Model, int]] = {"torch float32": (model, weights)}
    for name, path in (("ONNX float32", plain), ("ONNX int8 static", static), ("ONNX int8 dynamic", dynamic)):
        found[name] = (OnnxModel(path), path.stat().st_size)
    return found


@torch.no_grad()
def classes(model: Model, images: Tensor) -> Tensor:
    return torch.cat([model(part).argmax(1) for part in images.split(64)])


@torch.no_grad()
def times(models: dict[Any, Model], images: Tensor, repeat: int) -> dict[Any, list[float]]:
    """Seconds of this thread for one batch, `repeat` times each, by turns; a first turn is thrown away."""
    found: dict[Any, list[float]] = {name: [] for name in models}
    calls = max(1, 16 // len(images))
    for turn in range(repeat + 1):
        for name, model in models.items():
            start = time.thread_time()
            for _ in range(calls):
                model(images)
            if turn:
                found[name].append((time.thread_time() - start) / calls)
    return found


def table(rows: list[dict[str, Any]]) -> str:
    head = ["system", "run by", "MB", *(f"time, batch {b}" for b in BATCHES), *KINDS, "changed"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        right = [f"{100 * row['accuracy'][kind]:.1f}" for kind in KINDS]
        spent = [f"{row['time'][str(b)]['median']:.2f}" for b in BATCHES]
        lines.append([row["system"], row["run_by"], f"{row['bytes'] / 1e6:.2f}", *spent, *right, str(row["changed"])])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classifier", default="zoo:mnist-resnet8")
    parser.add_argument("--purifiers", default="zoo:protect-mnist,zoo:finetune-mnist")
    parser.add_argument("--data", default="mnist")
    parser.add_argument("--eps", type=float, default=0.3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--calibration", type=int, default=256)
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "export" / "export.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = up.load_dataset(options.data)
    test, training = data.test.subset(options.n), data.train.subset(options.calibration)
    images, labels = test.batch(torch.arange(len(test)))
    classifier = up.load_classifier(options.classifier)
    systems: dict[str, nn.Module] = {"undefended": classifier}
    for name in options.purifiers.split(","):
        systems[name] = up.Protected(classifier, up.load_defense(name))
    pgd = up.create_attack("pgd", eps=options.eps, steps=options.steps)
    oblivious = pgd(classifier, images, labels, index=test.index)
    rows, models = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for name, system in systems.items():
            adaptive = oblivious if name == "undefended" else pgd(system, images, labels, index=test.index)
            shown = {"clean": images, "oblivious": oblivious, "adaptive": adaptive}
            place = Path(folder) / name.replace(":", "-")
            place.mkdir()
            torch_says: dict[str, Tensor] = {}
            for run_by, (model, size) in files(system, test, training, place).items():
                says = {kind: classes(model, shown[kind]) for kind in shown}
                torch_says = torch_says or says
                models[name, run_by] = model
                right = {kind: int((said == labels).sum()) / len(labels) for kind, said in says.items()}
                changed = sum(int((says[kind] != torch_says[kind]).sum()) for kind in shown)
                rows.append({"system": name, "run_by": run_by, "bytes": size, "accuracy": right, "changed": changed})
                print(rows[-1], flush=True)
        for batch in BATCHES:
            spent = times(models, images[:batch], options.repeat)
            bare = spent["undefended", "torch float32"]
            for row in rows:
                ratios = [a / b for a, b in zip(spent[row["system"], row["run_by"]], bare)]
                spread = {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
                row.setdefault("time", {})[str(batch)] = spread
    settings = {key: str(value) for key, value in vars(options).items() if key != "out"}
    record = {"settings": settings, "attack": repr(pgd), "fingerprint": test.fingerprint, "rows": rows}
    write_json(options.out, {**record, "environment": environment()})
    print(table(rows))


if __name__ == "__main__":
    main()

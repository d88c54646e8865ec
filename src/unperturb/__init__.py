"""unperturb: a learned purifier in front of an image classifier.

The public names, each loaded when it is first asked for: importing unperturb imports neither torch nor anything heavy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "Attack": "attacks",
    "AttackResult": "attacks",
    "Attacker": "attackers",
    "Benchmark": "benchmarking",
    "Certificates": "certifying",
    "Classifier": "classifiers",
    "Defense": "defenses",
    "DoubleMasking": "certifying",
    "ImageSet": "data",
    "ModelError": "mistakes",
    "PatchCertificates": "certifying",
    "Protected": "defenses",
    "Results": "results",
    "Splits": "data",
    "System": "systems",
    "ThreatModel": "threat_models",
    "as_image_set": "data",
    "attack_images": "attack_folder",
    "benchmark": "benchmarking",
    "budget": "attacks",
    "certify": "certifying",
    "certify_patch": "certifying",
    "compare": "results",
    "comparison_table": "results",
    "create_attack": "attacks",
    "create_classifier": "classifiers",
    "create_defense": "defenses",
    "evaluate": "evaluation.run",
    "export_onnx": "export",
    "known_copy_note": "data",
    "list_available": "available",
    "load_classifier": "classifiers",
    "load_dataset": "data",
    "load_defense": "defenses",
    "prepare": "data",
    "read_rows": "results.schema",
    "robust_accuracy": "results",
    "run_evaluation": "evaluation.run",
    "serve": "serving",
    "table": "results",
    "train_classifier": "training.jobs",
    "train_defense": "training.jobs",
    "wrap": "classifiers",
    "wrap_attack": "attacks",
    "write_report": "results.page",
}
__all__ = ["__version__", *sorted(_WHERE)]

if TYPE_CHECKING:
    from unperturb.attack_folder import attack_images
    from unperturb.attackers import Attacker
    from unperturb.attacks import Attack, AttackResult, budget, create_attack, wrap_attack
    from unperturb.available import list_available
    from unperturb.benchmarking import Benchmark, benchmark
    from unperturb.certifying import Certificates, DoubleMasking, PatchCertificates, certify, certify_patch
    from unperturb.classifiers import Classifier, create_classifier, load_classifier, wrap
    from unperturb.data import ImageSet, Splits, as_image_set, known_copy_note, load_dataset
    from unperturb.data.prepare import prepare
    from unperturb.defenses import Defense, Protected, create_defense, load_defense
    from unperturb.evaluation.run import evaluate, run_evaluation
    from unperturb.export import export_onnx
    from unperturb.mistakes import ModelError
    from unperturb.results import Results, compare, comparison_table, robust_accuracy, table
    from unperturb.results.page import write_report
    from unperturb.results.schema import read_rows
    from unperturb.serving import serve
    from unperturb.systems import System
    from unperturb.threat_models import ThreatModel
    from unperturb.training.jobs import train_classifier, train_defense


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        value = getattr(import_module(f"unperturb.{_WHERE[name]}"), name)
        globals()[name] = value  # `list_available` is a module and a function: the function is what is public
        return value
    raise AttributeError(f"module 'unperturb' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

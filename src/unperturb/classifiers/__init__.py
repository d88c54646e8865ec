"""Classifiers. A new family is one file and one line here."""

from unperturb.classifiers import airbench, convnet, convnext, lenet, mobilenet, resnet, vgg
from unperturb.classifiers.base import (
    Classifier,
    Normalize,
    classifiers,
    create_classifier,
    load_classifier,
    macs,
    save_classifier,
    wrap,
)
from unperturb.classifiers.fused_copy import FusedCopy, fused_copy

__all__ = [
    "Classifier",
    "FusedCopy",
    "Normalize",
    "airbench",
    "classifiers",
    "convnet",
    "convnext",
    "create_classifier",
    "fused_copy",
    "lenet",
    "load_classifier",
    "macs",
    "mobilenet",
    "resnet",
    "save_classifier",
    "vgg",
    "wrap",
]

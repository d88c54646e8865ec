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
from unperturb.classifiers.twin import Twin, twin

__all__ = [
    "Classifier",
    "Normalize",
    "Twin",
    "airbench",
    "classifiers",
    "convnet",
    "convnext",
    "create_classifier",
    "lenet",
    "load_classifier",
    "macs",
    "mobilenet",
    "resnet",
    "save_classifier",
    "twin",
    "vgg",
    "wrap",
]

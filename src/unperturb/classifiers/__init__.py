"""Classifiers. A new family is one file and one line here."""

from unperturb.classifiers import airbench, convnet, convnext, lenet, mobilenet, resnet, small_cnn, vgg
from unperturb.classifiers.base import (
    Classifier,
    Normalize,
    classifiers,
    create_classifier,
    load_classifier,
    macs,
    save_classifier,
)
from unperturb.classifiers.fused_copy import FusedCopy, fused_copy
from unperturb.classifiers.onnx_file import OnnxModel
from unperturb.classifiers.wrapped import wrap

__all__ = [
    "Classifier",
    "FusedCopy",
    "Normalize",
    "OnnxModel",
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
    "small_cnn",
    "vgg",
    "wrap",
]

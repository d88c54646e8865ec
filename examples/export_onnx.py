"""A protected model as one ONNX file, run without torch or this package.

    pip install -e '.[onnx]'
    python examples/export_onnx.py

Inside a clone: the weights are the zoo's. `unperturb export` does the same from the command line.
"""

import onnxruntime
import torch

import unperturb as up

protected = up.Protected(up.load_classifier("zoo:mnist-resnet8"), up.load_defense("zoo:protect-mnist"))
data = up.load_dataset("digits")  # as large and as grey as MNIST, and here without a network
shown = data.test.take(torch.arange(32))

# Both are run on these images; a file that answers otherwise is not kept.
print(up.export_onnx(protected, "protected.onnx", shown))
print(up.export_onnx(protected, "protected-int8.onnx", shown, int8=data.train.subset(64)))

# From here on as anybody would who has the file alone.
session = onnxruntime.InferenceSession("protected.onnx")
about = session.get_modelmeta().custom_metadata_map
print({key: about[key] for key in ("name", "input_shape", "input_range", "classes", "opset")})
images = shown.images.numpy().astype("float32") / 255
(logits,) = session.run(None, {"images": images[:5]})
print("classes:", logits.argmax(1).tolist(), "labels:", shown.labels[:5].tolist())

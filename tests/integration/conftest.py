"""Where a program that these tests need is missing, none of them is collected; `make integration` installs all."""

from importlib.util import find_spec

COMPANIONS = ["accelerate", "lightning", "onnx", "onnxruntime", "onnxscript", "safetensors", "tensorboard"]

collect_ignore_glob = [] if all(map(find_spec, COMPANIONS)) else ["*"]

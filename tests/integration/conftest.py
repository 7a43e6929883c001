"""Where a program that these tests need is missing, none of them is collected; `make integration` installs all."""

import os
from importlib.util import find_spec

COMPANIONS = ["accelerate", "lightning", "onnx", "onnxruntime", "onnxscript", "safetensors", "tensorboard"]

collect_ignore_glob = [] if all(map(find_spec, COMPANIONS)) else ["*"]

os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported

"""ONNX files to TensorRT plans, one fresh process a plan, in either flavour of TensorRT."""

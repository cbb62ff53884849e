"""One segmenter run elsewhere: compiled, in ONNX Runtime, in OpenVINO."""

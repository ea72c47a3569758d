"""TensorRT engines: built from a release's FP16 graphs, on the machine that will run them."""

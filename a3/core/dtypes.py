"""Number types and their sizes in bytes; this module imports nothing."""

WIDTHS = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}

# Of a forward pass.
RUN_DTYPES = ("float32", "bfloat16", "float16")

# Of a training; float16 would need losses to be scaled.
HEAL_DTYPES = ("float32", "bfloat16")

# Types of GGUF files that the gguf package can make.
GGUF_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")

# Types of ONNX graphs, and the dtypes that they are.
GRAPH_TYPES = {"f32": "float32", "f16": "float16"}

"""Number types and their sizes in bytes; this module imports nothing."""

WIDTHS = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}

# Of a forward pass, and of what the weights of a compressed folder may be stored in.
RUN_DTYPES = ("float32", "bfloat16", "float16")

# Of a training; float16 would need losses to be scaled.
HEAL_DTYPES = ("float32", "bfloat16")

# Types of GGUF files that the gguf package can make: numbers of a block, and its bytes.
GGUF_BLOCKS = {
    "f32": (1, 4),
    "f16": (1, 2),
    "bf16": (1, 2),
    "q8_0": (32, 34),
    "q5_1": (32, 24),
    "q5_0": (32, 22),
    "q4_1": (32, 20),
    "q4_0": (32, 18),
}

GGUF_TYPES = tuple(GGUF_BLOCKS)

# Types of ONNX graphs, and the dtypes that they are.
GRAPH_TYPES = {"f32": "float32", "f16": "float16"}

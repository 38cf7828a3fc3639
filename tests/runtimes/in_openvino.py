"""Run where OpenVINO is: reads a graph of a3 export onnx, or a folder of optimum-intel."""

import glob
import os

import numpy as np
import openvino
from answering import main
from graphs import Cached, feed_of

# Their own choice is float16 for the cache, and bfloat16 for the rest where the CPU has it.
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
VERSION = f"OpenVINO {openvino.__version__.split('-')[0]}"


class Graph(Cached):
    """A folder of a3 export onnx in OpenVINO, in float32."""

    version = VERSION

    def __init__(self, folder):
        path = glob.glob(f"{folder}/onnx/*.onnx")[0]  # noqa: PTH207
        self.model = openvino.Core().compile_model(path, "CPU", EXACT)
        self.inputs = {one.any_name: one.partial_shape for one in self.model.inputs}

    def start(self):
        """Empty the cache."""
        self.length, self.past = 0, {}
        for name, shape in self.inputs.items():
            if name.startswith("past_key_values."):
                sizes = (1, shape[1].get_length(), 0, shape[3].get_length())
                self.past[name] = np.zeros(sizes, np.float32)

    def results(self, feed):
        """The graph's results in their order."""
        # They lie in memory that the next call writes to.
        return [value.copy() for value in self.model(feed).values()]


class Stateful:
    """A folder of optimum-intel, whose model keeps its cache, in float32."""

    version = VERSION

    def __init__(self, folder):
        model = openvino.Core().compile_model(f"{folder}/openvino_model.xml", "CPU", EXACT)
        self.request = model.create_infer_request()

    def start(self):
        """Empty the cache."""
        self.length = 0
        self.request.reset_state()

    def read(self, ids):
        """Logits of tokens that follow."""
        feed = feed_of(ids, self.length) | {"beam_idx": np.zeros(1, np.int32)}
        self.length += len(ids)
        return self.request.infer(feed)["logits"][0].copy()

    def held(self):
        """Bytes of the cache."""
        return sum(one.state.byte_size for one in self.request.query_state())


def either(folder):
    """The class for a folder."""
    return (Stateful if os.path.exists(f"{folder}/openvino_model.xml") else Graph)(folder)  # noqa: PTH110


if __name__ == "__main__":
    main(either)

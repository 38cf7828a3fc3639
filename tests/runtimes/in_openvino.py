"""Run where OpenVINO is: reads the graph of a3 export onnx."""

import glob

import numpy as np
import openvino
from answering import main
from graphs import Cached


class Graph(Cached):
    """A folder of a3 export onnx in OpenVINO, in float32."""

    version = f"OpenVINO {openvino.__version__.split('-')[0]}"

    def __init__(self, folder):
        core = openvino.Core()
        path = glob.glob(f"{folder}/onnx/*.onnx")[0]  # noqa: PTH207
        # Its own choice would be bfloat16 where the CPU has it.
        self.model = core.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
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


if __name__ == "__main__":
    main(Graph)

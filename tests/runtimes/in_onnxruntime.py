"""Run where onnxruntime is: reads the graph of a3 export onnx."""

import glob

import numpy as np
import onnxruntime
from answering import main
from graphs import Cached


class Graph(Cached):
    """A folder of a3 export onnx in onnxruntime; empty caches are made by the graph's inputs."""

    version = f"onnxruntime {onnxruntime.__version__}"

    def __init__(self, folder):
        options = onnxruntime.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, 2
        path = glob.glob(f"{folder}/onnx/*.onnx")[0]  # noqa: PTH207
        providers = ["CPUExecutionProvider"]
        self.session = onnxruntime.InferenceSession(path, options, providers=providers)
        self.inputs = {one.name: one for one in self.session.get_inputs()}

    def start(self):
        """Empty the cache."""
        self.length, self.past = 0, {}
        for name, one in self.inputs.items():
            if name.startswith("past_key_values."):
                dtype = np.float16 if "float16" in one.type else np.float32
                self.past[name] = np.zeros((1, one.shape[1], 0, one.shape[3]), dtype)

    def results(self, feed):
        """The graph's results in their order."""
        return self.session.run(None, feed)


if __name__ == "__main__":
    main(Graph)

"""Run where onnxruntime is: reads the graph of a3 export onnx."""

import glob

import numpy as np
import onnxruntime
from answering import main


class Graph:
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

    def read(self, ids):
        """Logits of tokens that follow."""
        end = self.length + len(ids)
        feed = {
            "input_ids": np.array([ids]),
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(self.length, end)[None],
        }
        feed = {name: value for name, value in feed.items() if name in self.inputs}
        logits, *past = self.session.run(None, feed | self.past)
        self.past = dict(zip(self.past, past, strict=True))
        self.length = end
        return logits[0]

    def held(self):
        """Bytes of the cache."""
        return sum(value.nbytes for value in self.past.values())


if __name__ == "__main__":
    main(Graph)

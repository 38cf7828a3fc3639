"""Run where OpenVINO is: reads the graph of a3 export onnx."""

import glob

import numpy as np
import openvino
from answering import main


class Graph:
    """A folder of a3 export onnx in OpenVINO, in float32."""

    version = f"OpenVINO {openvino.__version__.split('-')[0]}"

    def __init__(self, folder):
        core = openvino.Core()
        path = glob.glob(f"{folder}/onnx/*.onnx")[0]  # noqa: PTH207
        # Its own choice would be bfloat16 where the CPU has it.
        self.model = core.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        self.shapes = {one.any_name: one.partial_shape for one in self.model.inputs}
        self.names = [one.any_name for one in self.model.outputs]

    def start(self):
        """Empty the cache."""
        self.length, self.past = 0, {}
        for name, shape in self.shapes.items():
            if name.startswith("past_key_values."):
                sizes = (1, shape[1].get_length(), 0, shape[3].get_length())
                self.past[name] = np.zeros(sizes, np.float32)

    def read(self, ids):
        """Logits of tokens that follow."""
        end = self.length + len(ids)
        feed = {
            "input_ids": np.array([ids]),
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(self.length, end)[None],
        }
        feed = {name: value for name, value in feed.items() if name in self.shapes}
        # The results lie in memory that the next call writes to.
        found = [value.copy() for value in self.model(feed | self.past).values()]
        logits, *past = found
        self.past = dict(zip(self.past, past, strict=True))
        self.length = end
        return logits[0]

    def held(self):
        """Bytes of the cache."""
        return sum(value.nbytes for value in self.past.values())


if __name__ == "__main__":
    main(Graph)

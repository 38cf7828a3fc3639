"""Run where onnxruntime-genai is: reads a folder that its builder made, in float32."""

import json

import numpy as np
import onnxruntime_genai as genai
from answering import main


class Built:
    """A built model."""

    version = f"onnxruntime-genai {genai.__version__}"

    def __init__(self, folder):
        self.model = genai.Model(folder)
        with open(f"{folder}/genai_config.json") as stream:  # noqa: PTH123
            self.length = min(1024, json.load(stream)["model"]["context_length"])

    def start(self):
        """Empty the cache."""
        params = genai.GeneratorParams(self.model)
        params.set_search_options(max_length=self.length, do_sample=False)
        self.generator = genai.Generator(self.model, params)

    def read(self, ids):
        """Logits of tokens that follow."""
        self.generator.append_tokens(np.array([ids], np.int32))
        return np.array(self.generator.get_output("logits"))[0]

    def held(self):
        """Bytes of the cache: not known."""
        return 0


if __name__ == "__main__":
    main(Built)

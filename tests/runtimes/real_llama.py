"""llama.cpp's C functions, which the wheel of xllamacpp holds, as far as the tests need them.

Needs numpy and xllamacpp alone. Structures are those of llama.h at the version of
requirements.lock; `Context` checks that they fit.
"""

import ctypes
import os
from ctypes import (
    POINTER,
    Structure,
    c_bool,
    c_char_p,
    c_float,
    c_int8,
    c_int32,
    c_uint32,
    c_void_p,
)

import numpy as np
import xllamacpp

TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8, "bf16": 30}
OFF, ON = 0, 1


class ModelParams(Structure):
    """struct llama_model_params."""

    _fields_ = [
        ("devices", c_void_p),
        ("tensor_buft_overrides", c_void_p),
        ("n_gpu_layers", c_int32),
        ("split_mode", c_int32),
        ("load_mode", c_int32),
        ("lazy_mode", c_int32),
        ("main_gpu", c_int32),
        ("tensor_split", c_void_p),
        ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p),
        ("kv_overrides", c_void_p),
        ("flags", c_bool * 8),
        ("rest", c_int8 * 64),
    ]


class ContextParams(Structure):
    """struct llama_context_params."""

    _fields_ = [
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("n_seq_max", c_uint32),
        ("n_rs_seq", c_uint32),
        ("n_outputs_max", c_uint32),
        ("n_outputs_max_per_seq", c_uint32),
        ("n_threads", c_int32),
        ("n_threads_batch", c_int32),
        ("ctx_type", c_int32),
        ("rope_scaling_type", c_int32),
        ("pooling_type", c_int32),
        ("attention_type", c_int32),
        ("flash_attn_type", c_int32),
        ("rope", c_float * 6),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        ("cb_eval", c_void_p),
        ("cb_eval_user_data", c_void_p),
        ("type_k", c_int32),
        ("type_v", c_int32),
        ("rest", c_int8 * 128),
    ]


class Batch(Structure):
    """struct llama_batch."""

    _fields_ = [
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", c_void_p),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    ]


def library():
    """The functions, with their types."""
    folder = os.path.dirname(xllamacpp.__file__)  # noqa: PTH120
    names = [name for name in os.listdir(folder) if name.endswith(".so")]  # noqa: PTH208
    lib = ctypes.CDLL(os.path.join(folder, names[0]))  # noqa: PTH118
    pointers = {
        "llama_model_load_from_file": [c_char_p, ModelParams],
        "llama_init_from_model": [c_void_p, ContextParams],
        "llama_model_get_vocab": [c_void_p],
        "llama_model_chat_template": [c_void_p, c_char_p],
        "llama_get_logits": [c_void_p],
        "llama_vocab_get_text": [c_void_p, c_int32],
    }
    for name, arguments in pointers.items():
        getattr(lib, name).argtypes = arguments
        getattr(lib, name).restype = c_void_p
    lib.llama_get_logits.restype = POINTER(c_float)
    lib.llama_model_chat_template.restype = c_char_p
    lib.llama_model_default_params.restype = ModelParams
    lib.llama_context_default_params.restype = ContextParams
    lib.llama_batch_init.restype = Batch
    lib.llama_decode.argtypes = [c_void_p, Batch]
    lib.llama_batch_free.argtypes = [Batch]
    for name in ("llama_free", "llama_model_free", "llama_n_ctx", "llama_vocab_n_tokens"):
        getattr(lib, name).argtypes = [c_void_p]
    lib.llama_state_seq_get_size.argtypes = [c_void_p, c_int32]
    lib.llama_state_seq_get_size.restype = ctypes.c_size_t
    lib.llama_tokenize.argtypes = [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32]
    lib.llama_tokenize.argtypes += [c_bool, c_bool]
    silent = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)(lambda *_: None)
    lib.silent = silent  # has to live as long as the library
    lib.llama_log_set(silent, None)
    lib.llama_backend_init()
    return lib


LIB = library()


class Model:
    """A GGUF file in llama.cpp."""

    def __init__(self, path):
        self.model = LIB.llama_model_load_from_file(str(path).encode(), default_model())
        if not self.model:
            raise ValueError(f"llama.cpp does not load {path}")
        self.vocabulary = LIB.llama_model_get_vocab(self.model)
        self.tokens = LIB.llama_vocab_n_tokens(self.vocabulary)

    def tokenize(self, text, special=True, surround=False):
        """Ids of a text."""
        content = text.encode()
        found = (c_int32 * (len(content) + 8))()
        count = LIB.llama_tokenize(
            self.vocabulary, content, len(content), found, len(found), surround, special
        )
        return list(found[:count])

    def template(self, name=None):
        """A chat template of the file."""
        found = LIB.llama_model_chat_template(self.model, name.encode() if name else None)
        return found.decode() if found else None

    def logits(self, ids, cache="f16", flash=False, size=1024, calls=1):
        """Logits (tokens, vocabulary) float32 and the bytes of the cache that they left.

        The tokens are read in so many calls, one after the other.
        """
        context = self.context(cache, flash, max(size, len(ids)))
        each = -(-len(ids) // calls)
        found = [self.read(context, ids[i : i + each], i) for i in range(0, len(ids), each)]
        held = LIB.llama_state_seq_get_size(context, 0)
        LIB.llama_free(context)
        return np.concatenate(found), held

    def greedy(self, ids, count, size=1024):
        """The `count` likeliest tokens after `ids`, one by one."""
        context, made = self.context("f32", flash=False, size=size), []
        last = self.read(context, ids, 0)
        for place in range(len(ids), len(ids) + count):
            made.append(int(last[-1].argmax()))
            last = self.read(context, made[-1:], place)
        LIB.llama_free(context)
        return made

    def context(self, cache, flash, size):
        """A cache of `size` tokens."""
        params = LIB.llama_context_default_params()
        # The structure fits where llama.cpp's own default of the cache is where it is looked for.
        assert (params.type_k, params.type_v) == (TYPES["f16"], TYPES["f16"])
        params.n_ctx, params.n_batch, params.n_ubatch = size, size, size
        params.n_threads = params.n_threads_batch = 2
        params.flash_attn_type = ON if flash else OFF
        params.type_k = TYPES[cache]
        # llama.cpp quantises values for flash attention only.
        params.type_v = TYPES[cache if flash or cache in ("f32", "f16") else "f16"]
        context = LIB.llama_init_from_model(self.model, params)
        if not context:
            raise ValueError(f"llama.cpp makes no cache of {cache}")
        assert LIB.llama_n_ctx(context) >= size
        return context

    def read(self, context, ids, start):
        """Logits of tokens that stand from `start` on."""
        batch = LIB.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, number in enumerate(ids):
            batch.token[i], batch.pos[i], batch.logits[i] = number, start + i, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        assert LIB.llama_decode(context, batch) == 0
        found = np.ctypeslib.as_array(LIB.llama_get_logits(context), (len(ids), self.tokens)).copy()
        LIB.llama_batch_free(batch)
        return found

    def close(self):
        """Give the memory back."""
        LIB.llama_model_free(self.model)


def default_model():
    """What a model is loaded with: no GPU."""
    params = LIB.llama_model_default_params()
    params.n_gpu_layers = 0
    return params

"""The families that a3 refuses, with the reason."""

# Why a family cannot be one, and its model types.
_REFUSED = {
    "an encoder-decoder: cross-attention takes keys and values from another sequence than queries, "
    "for which a3 has no statistics": (
        "bart bigbird_pegasus blenderbot blenderbot-small encoder-decoder fsmt led longt5 m2m_100 "
        "marian mbart mt5 mvp nllb-moe pegasus pegasus_x plbart prophetnet switch_transformers t5 "
        "t5gemma t5gemma2 umt5 whisper"
    ),
    "with multi-head latent attention: keys and values are made from a shared low-rank latent, and "
    "the latent is what could be cached, so smaller heads would not make it smaller": (
        "deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa longcat_flash minicpm3 "
        "mistral4 youtu"
    ),
    "with layers that are recurrent, convolutional or linear attention: they have no softmax over "
    "products of queries and keys, to which the solutions of QK and OV belong": (
        "bailing_hybrid bamba falcon_h1 falcon_mamba jamba kimi_linear lfm2 "
        "lfm2_moe mamba mamba2 minimax nemotron_h olmo_hybrid qwen3_5 qwen3_5_moe qwen3_next "
        "recurrent_gemma rwkv xlstm zamba zamba2"
    ),
}

REFUSED: dict[str, str] = {
    model_type: reason for reason, types in _REFUSED.items() for model_type in types.split()
}

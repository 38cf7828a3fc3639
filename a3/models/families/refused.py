"""The families that a3 refuses without a probe, with the reason."""

# Why a family cannot be one, and its model types.
_REFUSED = {
    "an encoder-decoder: cross-attention takes keys and values from another sequence than queries, "
    "for which a3 has no statistics": (
        "bart bigbird_pegasus blenderbot blenderbot-small encoder-decoder fsmt led longt5 m2m_100 "
        "marian mbart mt5 mvp nllb-moe pegasus pegasus_x plbart prophetnet switch_transformers t5 "
        "t5gemma t5gemma2 umt5 whisper"
    ),
}

REFUSED: dict[str, str] = {
    model_type: reason for reason, types in _REFUSED.items() for model_type in types.split()
}

"""The decoder: one token sequence in, logits out.

The story, in call order: `embedding.MediaEncoders` writes pictures, sounds and videos into the sequence of text
embeddings; `decoder.Decoder` runs the layers, each `mla.LatentAttention` then `layers.SwiGLU` or
`moe.MixtureOfExperts`, and the multi-token-prediction modules (`mtp`); `load.load_model` reads a trained one back.
"""

"""The decoder: one token sequence in, logits out.

The story, in call order: `embedding.Embedding` writes text and picture embeddings into one sequence;
`decoder.Decoder` runs the layers, each `mla.LatentAttention` then `layers.SwiGLU` or `moe.MixtureOfExperts`;
`load.load_model` reads a trained one back.
"""

"""Files become segments, segments become one token sequence.

The story, in call order: `text.load_tokenizer` gives the vocabulary; `image.read_image` turns bytes into a
`sequence.Segment` of patches; `sequence.weave` joins the segments of one document; `sequence.lay_row` lays whole
documents side by side in one row of `seq_len` tokens.
"""

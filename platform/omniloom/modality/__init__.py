"""Files become segments, segments become one token sequence.

The story, in call order: `text.load_tokenizer` gives the vocabulary; `media.read_media` turns a picture, a sound
or a video (`image.read_image`, `audio.read_audio`, `video.read_video`) into `sequence.Segment`s; `sequence.weave`
joins the segments of one document; `sequence.lay_row` lays whole documents side by side in one row of `seq_len` tokens.
"""

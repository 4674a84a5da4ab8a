"""What a run would take, by arithmetic over its configuration; imports no torch and no other room.

The story, in call order: `params.count_parameters` counts a decoder's parameters, by part; `flops` what a token costs
forward and in training, and what it leaves in the cache.
"""
